"""The models behind one address, told apart by the names that clients ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException

from offramp.controller.errors import ConfigError, OfframpError, OverloadedError, RequestError
from offramp.deploy.http.backend import Pool
from offramp.worker.engine.service import RETRY_AFTER_S

Answerer = TypeVar("Answerer")


class UnavailableError(OfframpError):
    """Nobody answers for a model, or for any.

    Attributes:
        trouble: Why, such as "draining".
    """

    def __init__(self, trouble: str) -> None:
        self.trouble = trouble
        super().__init__(f"the server takes no requests now: it is {trouble}")


class ServedModels:
    """What answers for each model.

    Args:
        pools: One for each model; all of them tell the same clients.

    Raises:
        ConfigError: there is none, or two have the same name.
    """

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.by_name = {pool.model_id: pool for pool in pools}
        if not pools or len(self.by_name) < len(pools):
            names = ", ".join(pool.model_id for pool in pools) or "none"
            raise ConfigError("models", f"have to have names of their own, and are {names}")
        self.clients = pools[0].clients

    @property
    def only(self) -> str | None:
        """Name of the model, if there is but one."""
        return next(iter(self.by_name)) if len(self.by_name) == 1 else None

    def trouble(self) -> str | None:
        """Why none of them takes requests now; None if one does."""
        troubles = [pool.trouble() for pool in self.by_name.values()]
        return None if None in troubles else troubles[0]

    def load(self) -> tuple[int, int]:
        """Requests under way, and how many may be, of all together."""
        loads = [pool.load() for pool in self.by_name.values()]
        return sum(each for each, _ in loads), sum(most for _, most in loads)

    def named(self, name: str | None) -> Pool:
        """What answers for a model; of None, for the only one.

        Raises:
            RequestError: several are served, and none is named.
            HTTPException: 404; it is not served.
        """
        name = name or self.only
        known = " or ".join(map(repr, self.by_name))
        if name is None:
            raise RequestError("model", "is missing, and several are served", f"Ask for {known}")
        if name not in self.by_name:
            raise HTTPException(404, f"model: {name!r} is not served. Ask for {known}.")
        return self.by_name[name]


class Answerers(Generic[Answerer]):
    """What makes the answers of one kind, by model.

    Args:
        models: All models of the address.
        by_name: What answers, of those that can.
        refusal: What is said of others, such as "classifies texts, and makes no tokens".
    """

    def __init__(self, models: ServedModels, by_name: dict[str, Answerer], refusal: str) -> None:
        self._models, self._by_name, self._refusal = models, by_name, refusal

    def of(self, name: str, request: Request) -> Answerer:
        """What is to answer a request, which gets its place for a model only if that has one.

        Raises:
            HTTPException: 404; the model is not served.
            RequestError: it gives no answers of this kind.
            UnavailableError: nobody answers for it now, though somebody does for others.
            OverloadedError: it has no room, though others may have.
        """
        pool = self._models.named(name)
        request.scope["state"]["model"] = pool.model_id
        if pool.model_id not in self._by_name:
            known = " or ".join(map(repr, self._by_name))
            raise RequestError("model", f"{name!r} {self._refusal}", f"Ask for {known}")
        if (trouble := pool.trouble()) is not None:
            raise UnavailableError(trouble)
        outstanding, capacity = pool.load()
        if outstanding >= capacity:
            raise OverloadedError(RETRY_AFTER_S)
        return self._by_name[pool.model_id]


def classifies(pool: Any) -> bool:
    """Whether texts are classified there, and no tokens are made."""
    return bool(getattr(pool, "labels", ()))
