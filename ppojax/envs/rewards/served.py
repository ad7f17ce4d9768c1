"""What parts of a reward share that ask a model behind an address."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from ppojax.envs.rewards.part import Part
from ppojax.errors import ConfigError

_MAX_REPLY = 1_000_000  # bytes
Read = TypeVar("Read")


class ServedError(RuntimeError):
    """A model cannot be reached, or what it said holds no score."""


class Served(Part):
    """A part whose model is asked over HTTP."""

    key: ClassVar[str]  # of the part, in `env.reward`
    error: ClassVar[type[ServedError]] = ServedError

    url: str = Field(description="address of the server, such as http://localhost:8000/v1")
    model: str = Field(description="name of the model there")
    timeout_s: float = Field(default=20.0, gt=0, description="seconds that one try may take")
    tries: int = Field(default=2, ge=1, description="times a request is sent until it succeeds")
    key_file: str | None = Field(default=None, description="file that holds the API key")

    @field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ValueError("expected an address such as http://localhost:8000/v1")
        return url

    def load(self) -> None:
        """Read the API key. Raises ConfigError."""
        self._authorization()

    def ask(self, route: str, body: dict[str, Any], read: Callable[[Any], Read]) -> Read:
        """Post `body`, with the model's name, to the address and `route`; return what `read` finds in the reply's JSON.

        A ValueError of `read` is a failed try. Raises `error`.
        """
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}{route}",
            json.dumps({"model": self.model, **body}).encode(),
            {"Content-Type": "application/json", **self._authorization()},
        )
        for left in reversed(range(self.tries)):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return read(json.loads(response.read(_MAX_REPLY)))
            except (OSError, ValueError) as error:  # URLError, HTTPError and time-outs are OSErrors
                refused = isinstance(error, urllib.error.HTTPError) and error.code in (400, 401, 403, 404)
                if not left or refused:
                    raise self.error(f"{self.url}: {error}") from error
            time.sleep(0.5)
        raise AssertionError("unreachable")

    def _authorization(self) -> dict[str, str]:
        if self.key_file is None:
            return {}
        try:
            return {"Authorization": f"Bearer {Path(self.key_file).read_text(encoding='utf-8').strip()}"}
        except OSError as error:
            where = f"env.reward.{self.key}.key_file={self.key_file}"
            raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
