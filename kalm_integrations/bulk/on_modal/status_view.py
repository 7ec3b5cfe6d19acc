"""How a job on Modal is shown, as text and as JSON."""

from __future__ import annotations

import json

from kalm_integrations.bulk.on_modal.state import State
from kalm_integrations.bulk.progress import counted, duration


def phase(state: State, *, alive: bool) -> str:
    """In one word: "complete", "stopped", "failed", "running" or "interrupted"."""
    if state.complete:
        return "complete"
    if state.stop is not None:
        return "stopped"
    if state.over:
        return "failed" if state.failed else "interrupted"
    return "running" if alive else "interrupted"


def shown(name: str, state: State | None, alive: bool, as_json: bool) -> str:
    """What `--status` and `--cancel` print."""
    if state is None:
        word, text = (
            ("preparing", "its input is being read")
            if alive
            else ("stopped", "stopped, before anything was sent")
        )
        return json.dumps({"job": name, "state": word}, indent=2) if as_json else f"{name}: {text}"
    if not as_json:
        lines = [f"{name}: {phase(state, alive=alive)}, {line(state)}"]
        for number, failure in sorted(state.failed.items()):
            lines.append(f"shard {number} failed: {failure.code}: {failure.message}")
        if state.stop is not None:
            lines.append(f"stopped ({state.stop.reason}): {state.stop.message}")
        return "\n".join(lines)
    manifest, speed, stop = state.manifest, state.speed, state.stop
    data = {
        "job": name,
        "state": phase(state, alive=alive),
        "source": state.description.source,
        "shards": state.total,
        "finished": len(state.finished),
        "failed": [
            {"shard": number, "code": failure.code, "message": failure.message}
            for number, failure in sorted(state.failed.items())
        ],
        "stopped": stop and {"reason": stop.reason, "message": stop.message},
        **{n: getattr(manifest, n) for n in ("rows", "rejected", "truncated", "reused", "tokens")},
        "tokens_per_second": speed and speed[0],
        "seconds_left": speed and speed[1],
        "containers": len(state.containers),
        "container_seconds": state.seconds,
        "dollars": state.dollars,
        "dollars_to_come": None if state.over else state.dollars_to_come,
        "runs": state.runs,
        "identity": manifest.job.identity,
    }
    return json.dumps(data, indent=2)


def line(state: State) -> str:
    """How far a job is."""
    manifest = state.manifest
    parts = [f"{len(state.finished):,} of {counted(state.total, 'shard')}"]
    if state.failed:
        parts.append(f"{len(state.failed):,} failed")
    parts += [counted(manifest.rows, "row"), counted(manifest.tokens, "token")]
    if not state.over and state.speed:
        parts += [f"{state.speed[0]:,.0f} tokens/s", f"about {duration(state.speed[1])} left"]
    if state.containers:
        parts += [counted(len(state.containers), "container"), f"${state.dollars:,.2f} so far"]
    if not state.over and state.dollars_to_come is not None:
        parts.append(f"${state.dollars_to_come:,.2f} to come")
    return ", ".join(parts)


def ways(name: str) -> str:
    """How to come back to a job."""
    return (
        f"Come back with the same command, or with `kalm embed --status {name}`, `--fetch {name} "
        f"--output DIR`, `--cancel {name}`."
    )
