"""Time attention over patches and over text by its kernel and by torch's: `python -m benchmarks.attention --out FILE`.

The kernel serves up to 128 keys; where there are more, both columns are torch's. See benchmarks/twins.py.
"""

from benchmarks.twins import Maker, Work, main, twins
from micro_diffusion.kernels.attention import attention

TEXT_LENGTH, HEAD = 77, 64


def cases(make: Maker, images: int, tokens: int, dim: int) -> dict[str, dict[str, Work]]:
    """Queries, keys and values as the linear layers give them, side by side."""
    x, kv, qkv = (
        make.leaf(images, tokens, dim),
        make.leaf(images, TEXT_LENGTH, 2 * dim),
        make.leaf(images, tokens, 3 * dim),
    )
    return {
        "cross-attention": twins(Work(lambda q, kv: [attention(q, *kv.chunk(2, -1), head_dim=HEAD)], [x, kv])),
        "self-attention": twins(Work(lambda qkv: [attention(*qkv.chunk(3, -1), head_dim=HEAD)], [qkv])),
    }


if __name__ == "__main__":
    main(__doc__, cases)
