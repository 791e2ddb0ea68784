"""Any strategy of Flower by name (Beutel et al. 2020, arXiv 2007.14390), its server half between fedtune's two.

    client: FedAvg's                                     server: one round of a flwr.serverapp.strategy class

    strategy.name = "flower"
    strategy.wraps = "FedAdam"             # or "package.module:Class", or "file.py:Class"
    strategy.options.eta = 0.01            # what its constructor takes

FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad (Reddi et al. 2021, arXiv 2003.00295), QFedAvg, FedMedian, FedTrimmedAvg, Krum,
MultiKrum and Bulyan. They see A, B and the dense tensors as arrays under their names and know nothing of products, so
`aggregation_error` measures all that lies between the mean of the products and what is published, a step of a server
optimiser too. In each round an instance is made anew and what the last one remembered is put back from the state: a run
goes on after a crash to the same bits. QFedAvg's `train_loss` is the mean loss over a client's local steps.

Who takes part, how long is waited and what a weight is called is fedtune's to say, not an option's.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fedtune.aggregation import measured_error
from fedtune.payload import adapter_of, payload_of
from fedtune.strategy import ADAPTER, Answers, Ask, ClientInfo, Fold, ServerState
from strategies.fedavg import FedAvg

if TYPE_CHECKING:
    from fedtune.job import Job
    from strategies.flower_wrapped import Wrapped


@dataclass(frozen=True)
class Flower(FedAvg):
    """Any strategy of Flower: FedAdam, FedYogi, Krum, medians. Needs one rank for all clients."""

    name: ClassVar[str] = "flower"
    paper: ClassVar[str] = "Beutel et al. 2020, arXiv 2007.14390"
    secure_sum: ClassVar[bool] = False
    wraps: str = "FedAvg"  # a class of flwr.serverapp.strategy, or one's own
    options: Mapping[str, Any] = field(default_factory=dict)  # of its constructor

    def check_job(self, job: Job) -> None:
        self.wrapped().remembered()

    def check(self, clients: Sequence[ClientInfo]) -> None:
        super().check(clients)
        self.wrapped().remembered()

    def wrapped(self) -> Wrapped:
        from strategies.flower_wrapped import Wrapped  # only the server half needs Flower, which takes long to import

        return Wrapped(self.wraps, self.options)

    def round(self, state: ServerState, cohort: Sequence[ClientInfo]) -> Generator[Ask, Answers, ServerState]:
        sent, number = payload_of(state.adapter), int(state.scalars.get("round", 0)) + 1
        answers = yield Ask("train", self.broadcast(state), Fold.EACH, wants=ADAPTER)
        wrapped = self.wrapped()
        wrapped.restore(state.tensors, state.scalars)
        arrays = wrapped.aggregated(number, sent.tensors, [answer for _, _, answer in answers])
        adapter = adapter_of(replace(sent, tensors=arrays), like=state.adapter)
        tensors, scalars = wrapped.remembered()
        return ServerState(adapter, tensors, {**scalars, "round": float(number)}, measured_error(answers, adapter))
