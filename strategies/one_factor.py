"""What methods share that train one factor of each pair at a time: `ffa_lora`, `rolora`, `fedsvd`.

The factor that is frozen is the same for all clients, so the mean of the other one is the exact mean of the products:

    sum_i p_i s B_i A = s (sum_i p_i B_i) A        sum_i p_i s B A_i = s B (sum_i p_i A_i)

Only the trained factor and the dense tensors (heads) travel up. All clients train with the server's scale, so they cannot
disagree on alpha. What a subclass adds is which factor it is, what travels down, and what the server does with the mean.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import ClassVar

from fedtune.memory import Memory
from fedtune.payload import Role, adapter_of, payload_of
from fedtune.strategy import Answer, Answers, Ask, ClientInfo, LocalModel, ServerState, Strategy

KINDS = {Role.A: "train A", Role.B: "train B"}  # of the asks: each names the factor that trains


class OneFactor(Strategy):
    """One factor of each pair trains in a round, and travels with the dense tensors; the other is frozen."""

    exact: ClassVar[bool] = True
    secure_sum: ClassVar[bool] = True

    def trains(self, state: ServerState) -> Role:
        """The factor of the coming round: Role.A or Role.B."""
        return Role.B

    def after(self, state: ServerState) -> ServerState:
        """What the server makes of the state with the averaged factor."""
        return state

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        trained = self.trains(state)
        answers = yield Ask(KINDS[trained], self.broadcast(state), wants=(trained, Role.DENSE))
        return self.after(replace(state, adapter=adapter_of(answers.mean(), like=state.adapter)))

    def answer(self, ask: Ask, local: LocalModel, memory: Memory) -> Answer:
        trained, frozen = (Role.A, "B") if ask.kind == KINDS[Role.A] else (Role.B, "A")
        local.load(self.received(ask.payload), frozen=(frozen,))
        metrics = local.fit()
        return Answer(payload_of(local.adapter(), (trained, Role.DENSE)), local.examples, metrics)
