"""How many rows the product with the head has, and in chunks of how many (ops/linear_ce.py).

Letters: N tokens (B * S), M rows of the product, D model width, V vocabulary, R rows of one chunk.
"""

from collections.abc import Collection

CHUNK_COST = 128  # rows whose time a chunk costs on top: it reads the whole head, and launches its kernels
ROW_MULTIPLE = 8  # a chunk has a multiple of this many rows, for the alignment of half-precision products
MIN_ROWS_SAVED = 0.05  # share of the rows below which none are left out; `product_rows` says why


def product_rows(tokens: int, max_targets: int) -> int:
    """M, the rows of the product, for `tokens` (N) of which at most `max_targets` are supervised."""
    # Each row left out saves 2 * D * V multiply-adds and the passes over its V logits. Selecting, gathering and
    # scattering rows costs about ten small kernels and five passes over [N, D]: an estimated 90 us for 4,096 rows on an
    # H200, where Llama 1B's head takes 1.6 us per row. So leaving out a twentieth pays at that size, and breaks even at
    # a quarter of it. Full blocks, whose every token but the first is a target, keep the path without indices.
    return max(1, max_targets) if max_targets <= (1 - MIN_ROWS_SAVED) * tokens else tokens


def chunk_rows(rows: Collection[int], vocabulary: int, budget_mib: int, *, itemsize: int = 4) -> int:
    """The chunk size R for batches of `rows` rows (M of each planned shape), whose logits of `itemsize` bytes take at
    most `budget_mib` MiB (2**20 bytes).

    There is one size, since each would need its own graph. It is the one with the least work over all shapes (rows
    computed, padding included, plus CHUNK_COST per chunk) among those that divide a shape into equal chunks. For a
    single shape that gives the fewest equal chunks of a multiple of ROW_MULTIPLE rows.
    """
    max_rows = max(1, budget_mib * 2**20 // (itemsize * vocabulary))
    step = ROW_MULTIPLE if max_rows >= ROW_MULTIPLE else 1
    max_rows -= max_rows % step
    fewest = [-(-n // max_rows) for n in rows]  # chunks of each shape
    pairs = ((n, chunks) for n, least in zip(rows, fewest, strict=True) for chunks in range(least, 2 * least + 1))
    sizes = {-(-n // (chunks * step)) * step for n, chunks in pairs}
    return min(sorted(sizes, reverse=True), key=lambda size: sum(-(-n // size) * (size + CHUNK_COST) for n in rows))
