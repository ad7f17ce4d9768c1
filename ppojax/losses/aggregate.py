"""How per-token losses become one number, kept apart as a sum and the weight to divide it by."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ppojax.component import Component
from ppojax.lazy import Bool, Float, jax, jnp
from ppojax.types import Mean


class Aggregation(Component):
    """How the losses of tokens are averaged. Weights are counts of the whole minibatch, never of a microbatch."""

    mode: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"] = Field(
        default="token_mean",
        description="token_mean: over all action tokens; seq_mean_token_mean: over each sequence's tokens, then over "
        "sequences; seq_mean_token_sum: sum over a sequence, mean over sequences; constant: the same, divided by "
        "`constant` (Dr.GRPO)",
    )
    sequence: Literal["episode", "row"] = Field(
        default="episode",
        description="what the modes other than token_mean average over: episodes, which compaction cuts into several "
        "rows; or rows, so that an episode counts once for each row of it",
    )
    constant: float | None = Field(
        default=None, gt=0, description="divisor of mode=constant, in tokens; usually the longest response allowed"
    )

    @model_validator(mode="after")
    def _constant_goes_with_its_mode(self) -> Aggregation:
        if (self.mode == "constant") != (self.constant is not None):
            raise ValueError(
                f"aggregation: constant={self.constant} with mode={self.mode}; set `constant` when, and only when, "
                "mode=constant"
            )
        return self

    def __call__(
        self,
        x_BT: Float[jax.Array, "B T"],
        mask_BT: Bool[jax.Array, "B T"],
        written_B: Float[jax.Array, " B"] | None = None,
    ) -> Mean:
        """Aggregate x over the tokens where the mask holds; a sequence s counts when it has such a token.

        token_mean           sum_st m x / sum_st m                  (DAPO, arXiv 2503.14476, eq. 8)
        seq_mean_token_mean  mean_s (sum_t m x / sum_t m)           (GRPO, arXiv 2402.03300, eq. 3)
        seq_mean_token_sum   mean_s sum_t m x
        constant             mean_s sum_t m x / constant            (Dr.GRPO, arXiv 2503.20783)

        Both numbers add up over the parts of a batch that is split by rows: a row weighs n_b / n_s, its tokens over
        those of its sequence, and the rows of an episode weigh 1 together, wherever they lie. Values off the mask may
        be anything.

        Args:
            x_BT: losses of tokens.
            mask_BT: tokens that count.
            written_B: tokens that count in all rows of the row's episode (`Batch.written_B`); None where every
                episode is one row. With sequence=row it is not read.
        """
        row_sum_B = jnp.sum(jnp.where(mask_BT, x_BT, 0.0), axis=1)
        count_B = jnp.sum(mask_BT, axis=1, dtype=jnp.float32)
        if self.mode == "token_mean":
            return Mean(jnp.sum(row_sum_B), jnp.sum(count_B))
        whole_B = count_B if written_B is None or self.sequence == "row" else written_B
        whole_B = jnp.maximum(whole_B, 1.0)
        sequences = jnp.sum(count_B / whole_B)
        if self.mode == "seq_mean_token_mean":
            return Mean(jnp.sum(row_sum_B / whole_B), sequences)
        if self.mode == "seq_mean_token_sum":
            return Mean(jnp.sum(row_sum_B), sequences)
        assert self.constant is not None
        return Mean(jnp.sum(row_sum_B) / self.constant, sequences)
