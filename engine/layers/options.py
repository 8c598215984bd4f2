"""How layers are built: device, dtype, and the padding that makes a token's bits independent of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROW_MULTIPLE = 16
KEY_MULTIPLE = 512
# With several threads MKL splits float32 sums differently above about 128 rows (measured on 2 threads: equal bits at
# 16..128 rows for every shape tried, not at 144).
_MAX_ROWS_THREADED_FLOAT32 = 128


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Shared by all layers of one model.

    `row_multiple`: rows (and expert groups) of library linears and attention queries are padded to a multiple of it;
    `key_multiple`: the same for attention keys. 1 switches padding off, and exactness with it (negative controls).
    `max_rows`: a library linear takes at most that many rows per call; 0 is no bound.
    """

    device: torch.device
    dtype: torch.dtype
    row_multiple: int = ROW_MULTIPLE
    key_multiple: int = KEY_MULTIPLE
    max_rows: int = 0

    @classmethod
    def exact(cls, device: torch.device, dtype: torch.dtype, threads: int) -> LayerOptions:
        """The options under which a token's bits do not depend on the batch, for this many CPU threads."""
        threaded = device.type == "cpu" and dtype == torch.float32 and threads > 1
        return cls(device=device, dtype=dtype, max_rows=_MAX_ROWS_THREADED_FLOAT32 if threaded else 0)

    def padded_rows(self, num_rows: int) -> int:
        """`num_rows` rounded up, at least one multiple."""
        return max(round_up(num_rows, self.row_multiple), self.row_multiple)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple
