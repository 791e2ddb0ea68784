"""The one thing that an executor asks of a SuperLink's Runtime API before it has a task: the task."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

from fedtune.errors import UserError

SIGNED = ("/flwr.proto.Runtime/AcquireTask",)
REFUSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


@dataclass(frozen=True)
class Taken:
    run: int
    token: str  # who has it, speaks for the task


class Runtime:
    """`secret` is what the SuperLink was given too: without one, whoever reaches it can take tasks. No `ca`: no TLS."""

    def __init__(self, address: str, ca: bytes | None, secret: bytes | None = None) -> None:
        self._address, self._ca = address, ca
        signs = [SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=SIGNED)] if secret else []
        self._client = self._connected(*signs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.close()

    def acquire(self) -> Taken | None:
        """The oldest ServerApp that waits for an executor, of whatever run."""
        try:
            found = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        except httpx.HTTPStatusError as error:
            if error.response.status_code in REFUSED:
                raise UserError(
                    f"the SuperLink at {self._address} gives us no task ({error.response.status_code}); wanted, as "
                    "--superlink-secret, the file that its operator gave it as --superexec-auth-secret-file"
                ) from error
            raise
        return Taken(int(found.task.run_id), str(found.token)) if found.token else None

    def give_back(self, token: str, why: str) -> None:
        """As failed: Flower has no way to let another executor have it."""
        client = self._connected(RuntimeTokenHttpInterceptor(token=token))
        try:
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=why))
        finally:
            client.close()

    def _connected(self, *interceptors: Any) -> Any:
        version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
        return RuntimeHttpClient.from_server_address(
            self._address, insecure=self._ca is None, root_certificates=self._ca, interceptors=[version, *interceptors]
        )
