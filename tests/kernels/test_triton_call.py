"""What is left out of a serialized kernel call."""

from pallas_kernels.triton_call import without_field

LONG = b"x" * 300


def field(number, payload):
    size = bytes([len(payload)]) if len(payload) < 128 else bytes([len(payload) & 127 | 128, len(payload) >> 7])
    return bytes([number << 3 | 2]) + size + payload


def test_a_field_is_left_out():
    """Wherever it is, with what is beside it as it was: integers, fixed widths, other messages."""
    integer, fixed = bytes([2 << 3, 200, 1]), bytes([3 << 3 | 5, 1, 2, 3, 4]) + bytes([4 << 3 | 1]) + bytes(8)
    kernel = field(1, b"name") + integer + field(5, LONG) + field(4, LONG)
    lean = field(1, b"name") + integer + field(4, LONG)
    call = [field(1, field(1, k) + field(5, b"") + fixed) + field(4, b"beside") for k in (kernel, lean)]
    assert without_field(call[0], (1, 1, 5)) == call[1]
    assert without_field(call[1], (1, 1, 5)) == call[1]
    assert without_field(field(5, b"x"), (5,)) == without_field(b"", (5,)) == b""
