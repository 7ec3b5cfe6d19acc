"""What a test may turn: the platform's policies, and the surroundings of containers."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(kw_only=True, slots=True)
class Options:
    """Settings of one emulator. They may be changed while it runs, for what starts later."""

    # Who may come in.
    credentials: tuple[str, str] = ("ak-emulated", "as-emulated")
    proxy_tokens: set[tuple[str, str]] = field(
        default_factory=lambda: {("wk-emulated", "ws-emulated")}
    )

    # Where containers run. The interpreter needs `modal` (the platform mounts it) and whatever
    # the image installs; `container_env` comes last and wins.
    container_python: Path = Path(sys.executable)
    container_path: Sequence[Path] = ()
    container_env: Mapping[str, str] = field(default_factory=dict)
    isolated: bool = False
    """Own mount and host name namespaces: absolute paths are real, nothing outside is written.
    Linux and root only."""

    # Scheduling.
    max_local_containers: int = 4
    idle_seconds: float = 60.0
    """Scaledown window of functions that name none."""
    stop_grace: float = 10.0
    """Seconds from the interrupt that a stopped app's containers get to the kill (Modal: 30)."""
    max_inputs_outstanding: int = 1000

    # Failures.
    crash_backoff: tuple[float, float] = (0.1, 2.0)
    """Pause before the start that follows a failed one: the first, and its limit on doubling."""
    crashes_until_escalation: int | None = None
    """Failed starts in a row after which the waiting calls fail. None, as documented for deployed
    apps: never, they are retried without end. Ephemeral apps (`modal run`) use the next one."""
    ephemeral_crashes_until_escalation: int = 3
    max_internal_failures: int = 8
    """Containers that one input may lose before its caller sees InternalFailure; the client's own
    limit, the server's is not published."""

    # Memory snapshots.
    snapshots: bool = True
    """False: nothing is snapshotted, the container goes straight on to enter(snap=False)."""
    snapshot_seconds: float = 0.05
    restore_env: Mapping[str, str] = field(default_factory=dict)
    """Variables that differ on the machine where a snapshot is restored."""
    gpu_restore: str = "restore"
    """What the runtime reports of GPU memory: "restore", "resume", or "error"."""

    # The web door.
    web_redirect_after: float = 150.0
