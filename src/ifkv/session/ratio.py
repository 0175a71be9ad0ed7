"""Recompute ratios of requests: fixed, or planned for every request by ``ratio="auto"``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from ifkv.errors import InvalidInputError
from ifkv.planning.support import check_plannable
from ifkv.selectors import Budget, Selector

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ifkv.documents.cache import DocumentCache
    from ifkv.planning.plan import Plan
    from ifkv.planning.planner import Planner

Ratio = float | Budget | Literal["auto"]
Chooser = Callable[["Sequence[DocumentCache]", int, int], "tuple[Budget, Plan | None]"]


class Ratios:
    """Recompute ratios of a session and its requests; safe to share by threads.

    Args:
        model: A patched model.
        default: Ratio of requests that give none.
        backend: Attention backend, as in [ifkv.patch][]; rates are measured with it.
        planner: Planner that makes the plans. If None, `ifkv.planning.planner_for` makes one for
            this machine when the first plan is needed.

    Raises:
        InvalidInputError: The ratio is neither ``"auto"`` nor a ratio or budget.
    """

    def __init__(
        self, model: PreTrainedModel, default: Ratio, backend: str, planner: Planner | None
    ):
        self._model = model
        self._backend = backend
        self._planner = planner
        self._lock = threading.Lock()
        self._default = default
        if default != "auto":
            Budget.of(default)

    def fixed(self, ratio: Ratio | None, where: str) -> Budget:
        """Return the budget of a request that cannot be planned.

        Args:
            ratio: Ratio that the request gives, or None.
            where: Kind of request that cannot be planned, for the message.

        Raises:
            InvalidInputError: The ratio is ``"auto"`` or not a valid ratio.
        """
        given = self._default if ratio is None else ratio
        if given == "auto":
            raise InvalidInputError(
                f"ratio is 'auto', but {where} are not planned; give a ratio between 0 and 1."
            )
        return Budget.of(given)

    def chooser(self, ratio: Ratio | None, selector: Selector, *, reorder: bool) -> Chooser:
        """Return a function from documents, prompt tokens and question tokens to a budget.

        For ``"auto"`` the machine is measured here if that has not been done, before the request's
        time is counted. A plan that recommends full prefill becomes a ratio of 1, which gives the
        same result.

        Raises:
            InvalidInputError: The ratio is not valid; or it is ``"auto"`` and the request cannot be
                planned.
        """
        given = self._default if ratio is None else ratio
        if given != "auto":
            budget = Budget.of(given)
            return lambda documents, prompt, question: (budget, None)
        check_plannable(selector, reorder=reorder)
        planner = self._planned()

        def choose(
            documents: Sequence[DocumentCache], prompt: int, question: int
        ) -> tuple[Budget, Plan]:
            plan = planner.plan(
                len(documents[0].prefix_ids) + sum(len(each.token_ids) for each in documents),
                documents=len(documents),
                prompt=prompt,
                question=question,
                selector=selector,
                first_exact=documents[0].surrogate is None,
            )
            return Budget(ratio=1.0 if plan.ratio is None else plan.ratio), plan

        return choose

    def _planned(self) -> Planner:
        with self._lock:  # threads that measured at once would slow each other down
            if self._planner is None:
                from ifkv.planning import planner

                self._planner = planner.planner_for(self._model, backend=self._backend)
            return self._planner
