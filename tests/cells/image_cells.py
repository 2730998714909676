"""The formulas of the cells whose states are images, transcribed to NumPy: each yields the states
and the outputs, step by step."""

import numpy as np
from linear_cells import sigmoid, zero_order_hold


def convolution(weight, image):
    """Pixel by pixel; what lies outside of the image counts as zero."""
    outputs, _, rows, columns = weight.shape
    _, height, width = image.shape
    result = np.zeros((outputs, height, width), np.result_type(weight, image))
    for y in range(height):
        for x in range(width):
            for i in range(rows):
                for j in range(columns):
                    at_y, at_x = y + i - (rows - 1) // 2, x + j - (columns - 1) // 2
                    if 0 <= at_y < height and 0 <= at_x < width:
                        result[:, y, x] += weight[:, :, i, j] @ image[:, at_y, at_x]
    return result


def numpy_conv_lstm(p, xs):
    c = h = np.zeros((p.hidden_channels, *p.image_shape))
    for x in xs:
        raw = convolution(p.weight_x, x) + convolution(p.weight_h, h) + p.bias[:, None, None]
        i, f, g, o = np.split(raw, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        yield (c, h), h


def numpy_conv_s5(p, xs):
    B, C = (w[0] + 1j * w[1] for w in (p.weight_x, p.weight_o))
    kept, gain = (a[:, None, None] for a in zero_order_hold(p))
    h = np.zeros((p.hidden_channels, *p.image_shape), complex)
    for x in xs:
        h = kept * h + gain * convolution(B, x)
        yield h, 2 * convolution(C, h).real + np.einsum("oi,ihw->ohw", p.skip, x)
