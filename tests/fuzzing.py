"""Ways to break the bytes and the JSON of a file."""

BIG = (
    1 << 31,
    1 << 32,
    1 << 61,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
    1 << 64,
    10**30,
    10**4000,
)
ODD = (
    *BIG,
    *(-n for n in BIG),
    -1,
    0,
    1,
    2,
    7,
    True,
    False,
    None,
    0.0,
    1.0,
    4.5,
    1e308,
    -0.0,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "4",
    "F32",
    "F8_E4M3",
    "F4",
    "BOOL",
    "I64",
    "\ud800",
    "\udfff x",
    "\x00",
    "\x1b[2J",
    "\n",
    "é",
    "名",
    "__metadata__",
    [],
    {},
    [0],
    [0, 0],
    [4, 0],
    [0, 4, 8],
    [[4]],
    [{}],
    {"a": 1},
    {"dtype": "F32"},
    [1 << 62, 1 << 62],
    [1 << 62, 1 << 62, 0],
    [0, 1 << 62, 1 << 62],
    [1] * 70,
    [-1, -4],
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
)


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def flipped(data, rng):
    data, edge = bytearray(data), min(len(data), rng.choice((8, 64, len(data))))
    for _ in range(rng.choice((1, 1, 2, 5))):
        data[rng.randrange(edge)] = rng.choice((rng.randrange(256), *b'"{}[]:,0-e\\'))
    return bytes(data)


def nodes(value, path=()):
    yield path
    for key in (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield from nodes(value[key], (*path, key))
