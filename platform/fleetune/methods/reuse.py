"""What methods share that compose adapters which exist already: how a job names them, and when they are read and checked."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal

from fleetune.config import Place
from fleetune.errors import UserError
from fleetune.methods.base import Method, MethodConfig
from fleetune.models.library import FIELD, Skill, content_of, library_content, read_library


class ReuseConfig(MethodConfig):
    """Settings of every method that composes adapters."""

    adapters: tuple[Place, ...] = ()
    """The adapters to compose: folders in PEFT's format, folders of such folders (all in them, by name), folders of runs, or hub
    ids. Their order is that of weights and gates."""
    broken: Literal["refuse", "skip"] = "refuse"
    """Whether a broken adapter ends the job before it starts, or is left out with a warning."""

    def check_job(self, job: Any) -> None:
        """There is something to compose."""
        if not self.adapters:
            raise UserError(
                "names no adapters, and this method composes some",
                field=FIELD,
                value=list(self.adapters),
                hint="name folders, such as [my-skills]; `fleetune adapters train` fills one",
            )

    def content(self) -> dict[str, str]:
        """The files of all adapters."""
        return {f"{FIELD}/{file}": digest for file, digest in library_content(self.adapters).items()}


class Reuse(Method):
    """Base of methods that compose adapters. The server alone reads them: clients are sent what they need of them."""

    config: ReuseConfig
    needed: ClassVar[int] = 2
    """Adapters that the method needs at least."""

    @cached_property
    def skills(self) -> list[Skill]:
        """The adapters, for the job's base and its matrices. Raises UserError if one does not fit (`models.library`)."""
        return read_library(
            self.config.adapters,
            self.context.base,
            self.context.sites,
            broken=self.config.broken,
            needed=self.needed,
        )

    def check(self) -> None:
        """All adapters can be read, and there are enough."""
        _ = self.skills

    def content(self) -> dict[str, str]:
        """The files of the adapters that were read."""
        return {f"{FIELD}/{file}": digest for file, digest in content_of(self.skills).items()}
