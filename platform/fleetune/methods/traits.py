"""What a method is like, as one frozen value: what the engine must know of it before it asks it for anything."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """The facts that hold for a method with certain settings. A method that wraps another one forwards them as they are."""

    partial_sums: bool = True
    """`Method.aggregate` needs only weighted sums over clients, which workers then form; otherwise it gets each update."""
    coupled: bool = False
    """All clients of a round must be worked on together, because they share something while they work (a server's half)."""
    groups: bool = False
    """Clients fall into groups that are sent different payloads (`Method.group`)."""
    draws_batches: bool = True
    """Clients work on batches of their examples; methods that only compose or only forward requests do not."""
    waits: bool = False
    """`Method.begin_round` needs the quality of the last evaluated round, so a round begins only when that is there."""
    backward: bool = True
    """Clients compute gradients by backpropagation; a method that does not must never start a backward pass."""
    private: bool = False
    """Clients keep tensors of their own from one round to the next."""
    ranked: bool = True
    """Adapters have ranks, and a client may train only the first of them (`Method.narrowed`)."""
    serves: bool = False
    """The server may have work of its own that needs a model and examples (`Method.server_work`); a worker carries it out."""
    in_turn: bool = False
    """Clients of a round work one after the other (`Method.turns`), so a round lasts as long as all their turns together."""
    caches: bool = False
    """The server keeps what clients sent of an example, so that a client works on it and sends it once in a run. Such a method
    sends no provisions."""
    references: bool = False
    """Examples have a reference path: the same response after a prompt with the ground-truth solution (`data.references`)."""
    pooled: bool = False
    """There is no federation: the server holds the examples of all clients and works on them alone (`problem.pooled`)."""
    steps: bool = True
    """The model changes by steps of a learning rate; otherwise it is put together from adapters that exist."""
