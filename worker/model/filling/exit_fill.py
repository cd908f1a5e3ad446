"""What fills behind one exit: products, and one compiled call for few tokens.

Shape suffixes: N tokens, D width, R outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from offramp.worker.model.kernels.fill_rows import FillJob, FillTarget
from offramp.worker.model.kernels.matrix import KernelMatrix
from offramp.worker.model.kernels.rounded import multiplies_bytes
from offramp.worker.model.kernels.rounding import BLOCK
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.prepared import PackedWeight
from offramp.worker.model.products import Product, can_pack
from offramp.worker.model.quantised import Int8Weight, QuantisedLinear


class ExitFill:
    """The products that make what tokens skipped which left after an exit.

    Args:
        one: Keys and values of the first layer, if the others read of them; None: they do not.
        rest: Those of the others, or of all.
        share: What the values of the token before are multiplied by before they are read.

    Attributes:
        few_rows: Up to so many tokens are filled by one compiled call.
    """

    def __init__(self, one: Product | None, rest: Product, share: float = 1.0) -> None:
        self.one, self.rest, self.share = one, rest, share
        few = [few_rows_of(each) for each in (one, rest) if each is not None]
        self.few_rows = min(rows for _, rows in few)
        self._matrices = [matrix for matrix, _ in few]
        self._job: FillJob | None = None

    def job(
        self, kv: SlotKV, norm: tuple[Tensor | None, float], target: Callable[[], FillTarget]
    ) -> FillJob:
        """The compiled call for a cache, made anew when that has grown.

        Args:
            kv: Cache on the CPU.
            norm: Weight and epsilon of the norm; see ``FillJob``.
            target: Says where entries go.
        """
        if self._job is None or not self._job.writes_to(kv):
            *before, rest = self._matrices
            assert rest is not None  # or few_rows were 0
            one = before[0] if before else None
            self._job = FillJob(norm, one, (rest, self.share), self.few_rows, target())
        return self._job


def product_of(weight_RI: Tensor, bias_R: Tensor | None, *, rounds: bool) -> Product:
    """The product of rows with a matrix; where it rounds, in 8 bits on a CPU that multiplies them.

    What a map gives lies further from what the layers would have made than rounding moves it, and
    in decoding its weights come from memory: a quarter of the bytes are a quarter of the time.
    """
    if not can_pack(weight_RI):
        return lambda x_NI: nn.functional.linear(x_NI, weight_RI, bias_R)
    if not rounds or weight_RI.shape[1] % BLOCK or not multiplies_bytes():
        return PackedWeight(weight_RI, bias_O=bias_R)
    plain = nn.Linear(1, 1, bias=bias_R is not None)
    plain.weight = nn.Parameter(weight_RI, requires_grad=False)
    if bias_R is not None:
        plain.bias = nn.Parameter(bias_R, requires_grad=False)
    return QuantisedLinear(plain, Int8Weight(weight_RI, rounds=True))


def with_values_alike(weight_RI: Tensor, width: int) -> tuple[Tensor, float]:
    """Weights of the token before's values nearly as large as the state's: half or more.

    An output's weights are rounded by one scale: of the smaller ones little would be left.

    Args:
        weight_RI: Weights of states [R, D], and behind them of values.
        width: Inputs D that are the state's.

    Returns:
        The weights, and what values have to be multiplied by for it: a power of two, which changes
        no other bit.
    """
    of_state, of_values = weight_RI.float().square().tensor_split([width], 1)
    ratio = float((of_state.mean() / of_values.mean()).sqrt())
    if not math.isfinite(ratio) or ratio == 0:
        return weight_RI, 1.0
    times = 2.0 ** math.floor(math.log2(ratio))
    return torch.cat((weight_RI[:, :width], weight_RI[:, width:] * times), 1), 1 / times


def few_rows_of(product: Product) -> tuple[KernelMatrix | None, int]:
    """The matrix by which kernels multiply few rows, and up to how many; None: none."""
    if isinstance(product, (PackedWeight, QuantisedLinear)):
        return product.matrix, 0 if product.matrix is None else product.kernel_rows
    return None, 0
