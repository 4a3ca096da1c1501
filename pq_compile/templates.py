"""The text of the Triton kernels: one kernel a template, the helpers they share, nothing launched.

``{NAMES}`` in braces are filled in by ``kernels.source``. Every operation here is one that
Triton's CPU interpreter computes right (``docs/kernels.md`` lists those it does not).
"""

HEADER = """\
import triton
import triton.language as tl
"""

TENSOR_SCALE = '''
@triton.jit
def tensor_scale_of(peak):
    """The tensor scale of NVFP4: peak / (6 * 448), at least 2**-112."""
    return tl.maximum(tl.div_rn(peak, 2688.0), 1.925929944387236e-34)
'''

GROUP_PEAK = '''
@triton.jit
def group_peak(groups):
    """The bits of the largest magnitude of each group; as integers NaN > infinity > finite."""
    return tl.max(groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
'''

ENCODE_E4M3 = '''
@triton.jit
def encode_e4m3(x):
    """float32 >= 0 -> the code of the nearest e4m3, ties to even, 448 (0x7E) at most."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (x + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.minimum(tl.where(x < 0.015625, subnormal, normal), 0x7E)
'''

ENCODE_E2M1 = '''
@triton.jit
def encode_e2m1(x):
    """float32 -> the code of the nearest e2m1, ties to even, 6 at most; keeps the sign of 0."""
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    x = tl.minimum(tl.abs(x), 6.0)
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - (126 << 1)
    subnormal = (x + 4194304.0).to(tl.int32, bitcast=True) - 0x4A800000
    return tl.where(x < 1.0, subnormal, normal) | sign
'''

PACK_INTEGER = (
    ENCODE_E2M1
    + '''
@triton.jit
def pack(even, odd):
    """Two channels to a byte, the even one in the low nibble."""
    return (encode_e2m1(even) | (encode_e2m1(odd) << 4)).to(tl.uint8)
'''
)

PACK_INSTRUCTION = '''
@triton.jit
def pack(even, odd):
    """Two channels to a byte, the even one in the low nibble; four bytes at a time."""
    return tl.inline_asm_elementwise(
        """
        {{
        .reg .b8 byte0, byte1, byte2, byte3;
        cvt.rn.satfinite.e2m1x2.f32 byte0, $5, $1;
        cvt.rn.satfinite.e2m1x2.f32 byte1, $6, $2;
        cvt.rn.satfinite.e2m1x2.f32 byte2, $7, $3;
        cvt.rn.satfinite.e2m1x2.f32 byte3, $8, $4;
        mov.b32 $0, {{byte0, byte1, byte2, byte3}};
        }}
        """,
        "=r,f,f,f,f,f,f,f,f",
        [even, odd],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )
'''

DECODE_E4M3 = '''
@triton.jit
def decode_e4m3(code):
    """The value of int32 e4m3 codes in float16, exactly: shifted into place, times 2**8."""
    bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    value = bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)
'''

DECODE_E2M1 = '''
@triton.jit
def decode_e2m1(code):
    """The value of int32 e2m1 codes in float16, exactly: shifted into place, times 2**14."""
    bits = ((code & 8) << 12) | ((code & 7) << 9)
    return bits.to(tl.int16).to(tl.float16, bitcast=True) * 16384.0
'''

DECODE_TILE = (
    DECODE_E4M3
    + DECODE_E2M1
    + '''
@triton.jit
def decode(packed, scales, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Bytes [ROWS, BYTES] and scale codes [ROWS, BYTES / 8] -> the even and the odd channels.

    element * scale has 6 significant bits and lies in 2**-10 .. 2688: exact in float16.
    """
    packed = packed.to(tl.int32)
    scale = decode_e4m3(scales.to(tl.int32))[:, :, None]
    even = decode_e2m1(packed & 15).reshape(ROWS, BYTES // 8, 8) * scale
    odd = decode_e2m1(packed >> 4).reshape(ROWS, BYTES // 8, 8) * scale
    return even.reshape(ROWS, BYTES), odd.reshape(ROWS, BYTES)
'''
)

LOAD_GROUPS = '''
@triton.jit
def load_groups(x_ptr, M):
    """The tile of x [M, {K}] of this program, float32 [ROWS, COLUMNS / 16, 16], zeros outside."""
    rows = tl.program_id(0) * {ROWS} + tl.arange(0, {ROWS})
    columns = tl.program_id(1) * {COLUMNS} + tl.arange(0, {COLUMNS})
    inside = (rows < M)[:, None] & (columns < {K})[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * {K} + columns[None, :], inside, other=0.0)
    return x.to(tl.float32).reshape({ROWS}, {COLUMNS} // 16, 16)
'''

PEAK = (
    GROUP_PEAK
    + LOAD_GROUPS
    + '''
@triton.jit(do_not_specialize=["M"])
def peak(x_ptr, peak_ptr, M):
    """peak = max |x| over the groups of 16 channels without NaN or infinity, as float32 bits."""
    bits = group_peak(load_groups(x_ptr, M))
    finite = tl.where(bits < 0x7F800000, bits, 0)
    tl.atomic_max(peak_ptr, tl.max(tl.max(finite, 1), 0))
'''
)

QUANTISE = (
    TENSOR_SCALE
    + GROUP_PEAK
    + LOAD_GROUPS
    + ENCODE_E4M3
    + DECODE_E4M3
    + "{PACK}"
    + '''
@triton.jit(do_not_specialize=["M"])
def quantise(x_ptr, peak_ptr, packed_ptr, scales_ptr, tensor_scale_ptr, M):
    """x [M, {K}] -> packed [M, {BYTES}], e4m3 codes [M, {GROUPS}] and the tensor scale."""
    tensor_scale = tensor_scale_of(tl.load(peak_ptr).to(tl.float32, bitcast=True))
    tl.store(tensor_scale_ptr, tensor_scale)
    groups = load_groups(x_ptr, M)
    bits = group_peak(groups)
    missing = bits >= 0x7F800000
    reciprocal = tl.div_rn(1.0, 6.0 * tensor_scale)
    code = encode_e4m3(bits.to(tl.float32, bitcast=True) * reciprocal)
    scale = decode_e4m3(code).to(tl.float32)
    dead = missing | (scale == 0.0)
    inverse = tl.div_rn(tl.div_rn(1.0, tensor_scale), tl.where(dead, 1.0, scale))
    scaled = groups * tl.where(dead, 0.0, inverse)[:, :, None]
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    even, odd = tl.split(scaled.reshape({ROWS}, {COLUMNS} // 2, 2))

    rows = tl.program_id(0) * {ROWS} + tl.arange(0, {ROWS})
    row = rows.to(tl.int64)[:, None]
    byte = (tl.program_id(1) * ({COLUMNS} // 2) + tl.arange(0, {COLUMNS} // 2))[None, :]
    group = (tl.program_id(1) * ({COLUMNS} // 16) + tl.arange(0, {COLUMNS} // 16))[None, :]
    inside = (rows < M)[:, None]
    tl.store(packed_ptr + row * {BYTES} + byte, pack(even, odd), inside & (byte < {BYTES}))
    code = tl.where(missing, 0x7F, code).to(tl.uint8)
    tl.store(scales_ptr + row * {GROUPS} + group, code, inside & (group < {GROUPS}))
'''
)

STORE_TILE = '''
@triton.jit
def store_tile(y_ptr, accumulator, scale, bias_ptr, row, column, inside):
    """y = accumulator * scale + bias, in float32, rounded once to y's dtype."""
    y = accumulator * scale
    if {BIAS}:
        y += tl.load(bias_ptr + column, column < {N}, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * {N} + column, y.to({DTYPE}), inside)
'''

INDICES = """
    rows = tl.program_id(0) * {BM} + tl.arange(0, {BM})
    columns = tl.program_id(1) * {BN} + tl.arange(0, {BN})
    offsets = tl.arange(0, {BK} // 2)
    groups = tl.arange(0, {BK} // 16)
    channels = tl.arange(0, {BK})
    row = rows.to(tl.int64)[:, None]
    column = columns.to(tl.int64)[:, None]
    accumulator = tl.zeros(({BM}, {BN}), dtype=tl.float32)
    for k in tl.range(0, {BLOCKS}, num_stages={STAGES}):
        byte = (k * ({BK} // 2) + offsets)[None, :]
        group = (k * ({BK} // 16) + groups)[None, :]
        w_inside = (columns < {N})[:, None]
        w = tl.load(w_ptr + column * {BYTES} + byte, w_inside & (byte < {BYTES}), other=0)
        w_scale = tl.load(
            w_scale_ptr + column * {GROUPS} + group, w_inside & (group < {GROUPS}), other=0
        )
"""

LOAD_A = """\
        a_inside = (rows < M)[:, None]
        a = tl.load(a_ptr + row * {BYTES} + byte, a_inside & (byte < {BYTES}), other=0)
        a_scale = tl.load(
            a_scale_ptr + row * {GROUPS} + group, a_inside & (group < {GROUPS}), other=0
        )
"""

STORE = """\
    inside = (rows < M)[:, None] & (columns < {N})[None, :]
    store_tile(y_ptr, accumulator, scale, bias_ptr, row, columns[None, :], inside)
"""

W4A4_SIGNATURE = """
@triton.jit(do_not_specialize=["M"])
def {NAME}(
    a_ptr, a_scale_ptr, a_tensor_scale_ptr,
    w_ptr, w_scale_ptr, w_tensor_scale_ptr, bias_ptr, y_ptr, M,
):
"""

W4A4_SCALE = "    scale = tl.load(a_tensor_scale_ptr) * tl.load(w_tensor_scale_ptr)\n"

W4A4_NATIVE = (
    STORE_TILE
    + W4A4_SIGNATURE
    + '    """y [M, {N}] = a @ w.T on FP4 tensor cores: e2m1 elements, e4m3 scales of 16."""'
    + INDICES
    + LOAD_A
    + """\
        a_scale = a_scale.to(tl.float8e4nv, bitcast=True)
        w_scale = w_scale.to(tl.float8e4nv, bitcast=True)
        accumulator = tl.dot_scaled(a, a_scale, "e2m1", w.T, w_scale, "e2m1", accumulator)
"""
    + W4A4_SCALE
    + STORE
)

W4A4_PORTABLE = (
    DECODE_TILE
    + STORE_TILE
    + W4A4_SIGNATURE
    + '    """y [M, {N}] = a @ w.T, decoded exactly to float16; even and odd channels apart."""'
    + INDICES
    + LOAD_A
    + """\
        a_even, a_odd = decode(a, a_scale, {BM}, {BK} // 2)
        w_even, w_odd = decode(w, w_scale, {BN}, {BK} // 2)
        accumulator = tl.dot(a_even, w_even.T, accumulator)
        accumulator = tl.dot(a_odd, w_odd.T, accumulator)
"""
    + W4A4_SCALE
    + STORE
)

W4A16_SIGNATURE = """
@triton.jit(do_not_specialize=["M"])
def {NAME}(x_ptr, w_ptr, w_scale_ptr, w_tensor_scale_ptr, bias_ptr, y_ptr, M):
"""

LOAD_X = """\
        w_even, w_odd = decode(w, w_scale, {BN}, {BK} // 2)
        channel = (k * {BK} + channels)[None, :]
        x_inside = (rows < M)[:, None] & (channel < {K})
        x = tl.load(x_ptr + row * {K} + channel, x_inside, other=0.0)
        x_even, x_odd = tl.split(x.reshape({BM}, {BK} // 2, 2))
"""

W4A16_SCALE = "    scale = tl.load(w_tensor_scale_ptr)\n"

W4A16_PORTABLE = (
    DECODE_TILE
    + STORE_TILE
    + W4A16_SIGNATURE
    + '    """y [M, {N}] = x @ w.T, w decoded exactly to the dtype of x."""'
    + INDICES
    + LOAD_X
    + """\
        w_even = w_even.to({DTYPE}).T
        w_odd = w_odd.to({DTYPE}).T
        accumulator = tl.dot(x_even, w_even, accumulator, input_precision="ieee")
        accumulator = tl.dot(x_odd, w_odd, accumulator, input_precision="ieee")
"""
    + W4A16_SCALE
    + STORE
)

W4A16_VECTOR = (
    DECODE_TILE
    + STORE_TILE
    + W4A16_SIGNATURE
    + '    """y [M, {N}] = x @ w.T for a handful of rows: products summed in float32."""'
    + INDICES
    + LOAD_X
    + """\
        even = x_even.to(tl.float32)[:, None, :] * w_even.to(tl.float32)[None, :, :]
        odd = x_odd.to(tl.float32)[:, None, :] * w_odd.to(tl.float32)[None, :, :]
        accumulator += tl.sum(even + odd, 2)
"""
    + W4A16_SCALE
    + STORE
)
