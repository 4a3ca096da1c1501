"""The helpers that kernels of row programs share, as text; see ``templates`` for the others."""

from __future__ import annotations

ENCODE_FP8 = {
    True: '''
@triton.jit
def encode_fp8(x):
    """float32 -> e4m3 codes by the conversion instruction: nearest, ties to even, 448 at most."""
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
''',
    False: '''
@triton.jit
def encode_fp8(x):
    """float32 -> e4m3 codes: nearest, ties to even, 448 at most; NaN becomes 0x7F."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    code = tl.where(x == x, encode_e4m3(tl.abs(x)), 0x7F)
    return (code | sign).to(tl.uint8)
''',
}

ROUND_E2M1 = '''
@triton.jit
def round_e2m1(x):
    """float32 -> the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to even."""
    x = tl.minimum(tl.maximum(x, -6.0), 6.0)
    size = tl.abs(x)
    magic = tl.where(size < 2.0, 6291456.0, tl.where(size < 4.0, 12582912.0, 25165824.0))
    return (x + magic) - magic
'''

SCALE_OF_GROUPS = '''
@triton.jit
def scale_of_groups(groups, tensor_scale):
    """Groups [G, 16] -> their e4m3 codes [G], the scales, and the groups over scale and tensor
    scale; 0 where the scale is 0, and of no meaning where it is NaN."""
    bits = tl.max(groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    reciprocal = tl.div_rn(1.0, 6.0 * tensor_scale)
    code = encode_fp8(bits.to(tl.float32, bitcast=True) * reciprocal).to(tl.int32)
    code = tl.where(bits >= 0x7F800000, 0x7F, code)
    scale = decode_e4m3(code).to(tl.float32)
    dead = (code == 0x7F) | (code == 0)
    inverse = tl.div_rn(tl.div_rn(1.0, tensor_scale), tl.where(dead, 1.0, scale))
    return code, scale, groups * tl.where(dead, 0.0, inverse)[:, None]
'''

FINITE_PEAK = '''
@triton.jit
def finite_peak(groups):
    """The bits of the largest magnitude in groups [G, 16] without a NaN or an infinity."""
    bits = tl.max(groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    return tl.max(tl.where(bits < 0x7F800000, bits, 0), 0)
'''

LARGEST_OF = '''
@triton.jit
def largest_of(peak, count):
    """The largest of the magnitudes that the instances of the first pass wrote, as bits."""
    largest = tl.zeros((1024,), tl.int32)
    for start in range(0, count, 1024):
        at = start + tl.arange(0, 1024)
        largest = tl.maximum(largest, tl.load(peak + at, at < count, other=0))
    return tl.max(largest, 0).to(tl.float32, bitcast=True)
'''
