"""Defines the options that go beyond one mask for all heads."""

from dataclasses import dataclass

from radial_attn.kernels.contract import FAR_FIELDS
from radial_attn.residual import MEMORIES, RESIDUALS
from radial_attn.selection import BUDGETS, SELECTIONS


@dataclass(frozen=True)
class Adaptive:
    """Holds the options that go beyond one mask for all heads; the defaults change nothing.

    Attributes:
        selection: "static" for the mask of the configuration; "dense_step" for the blocks that it would have
            cost most to drop at the last dense step; "profile" for those that it cost most in the runs that a
            profile was made of.
        budget: who shares the number of blocks: the rows of a "head", the heads of a "layer", or all
            layers of the "model".
        far_field: how dropped blocks count, as in `radial_attention`; with "linear" a dense step also
            measures the bias of each head, or the profile has it.
        residual: how the difference to the last dense output is kept and added: "none", "mean" of each block,
            "int8" or "int4". "output" keeps that output instead, and sparse steps compute no attention: the
            control that any other setting must beat.
        residual_memory: where it is kept: the "device", or the memory of the "host", pinned beside a GPU.
        profile: file of the profile, for that selection.

    Raises:
        ValueError: an unknown value, a residual with a budget of the whole model, "output" beside blocks that
            count, or a profile without its selection or the other way around.
    """

    selection: str = "static"
    budget: str = "layer"
    far_field: str = "none"
    residual: str = "none"
    residual_memory: str = "device"
    profile: str | None = None

    def __post_init__(self) -> None:
        choices = {
            "selection": SELECTIONS,
            "budget": BUDGETS,
            "far_field": FAR_FIELDS,
            "residual": RESIDUALS,
            "residual_memory": MEMORIES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                got = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {got!r}")
        if self.residual != "none" and self.budget == "model" and self.selection == "dense_step":
            raise ValueError(
                "budget='model' is known only after the last layer of a dense step, too late for "
                f"residual={self.residual!r}; use budget='layer'"
            )

        if self.residual == "output" and (self.selection, self.far_field) != ("static", "none"):
            raise ValueError(
                "residual='output' computes no attention at sparse steps; set selection='static' and "
                f"far_field='none', got {self.selection!r} and {self.far_field!r}"
            )

        if self.selection == "profile" and self.profile is None:
            raise ValueError("selection='profile' needs the file of a profile, got profile=None")
        if self.selection != "profile" and self.profile is not None:
            raise ValueError(
                f"profile={self.profile!r} serves selection='profile' alone, got selection={self.selection!r}"
            )

    @property
    def needs_dense_step(self) -> bool:
        """Tells whether a sparse call needs a dense one before it."""
        return self.selection == "dense_step" or self.residual != "none"

    @property
    def measures(self) -> bool:
        """Tells whether a dense step looks at sampled rows."""
        linear = self.selection == "static" and self.far_field == "linear"
        return self.selection == "dense_step" or linear

    @property
    def records(self) -> bool:
        """Tells whether a dense step is of use to the sparse ones after it."""
        return self.needs_dense_step or self.measures

    @property
    def has_state(self) -> bool:
        """Tells whether layers attend by more than the mask of the configuration."""
        return self.records or self.selection == "profile"
