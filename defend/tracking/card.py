"""The card of a run: what was promised, what was measured, and what neither covers."""

from collections.abc import Iterable, Mapping
from typing import Any


def render_card(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The card in Markdown; a part appears only where the run has it.

    Args:
        settings: facts from before the first step (threat model, privacy parameters).
        results: figures from after the last one (ε, accuracies, curves).
    """
    parts = ["# Defense card"]
    if "epsilon" in results:
        parts.append(_privacy(settings, results))
    if settings.get("adversarial_training"):
        parts.append(_training(settings))
    if "records" in results:
        parts.append(_robustness(results))
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {_plain(value)} |" for name, value in rows])


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _privacy(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    title = "## Privacy" if settings.get("private") else "## Privacy: NONE (fixed seed or no noise)"
    rows = [
        ("ε spent", results["epsilon"]),
        ("δ", settings.get("delta")),
        ("target ε", settings.get("target_epsilon")),
        ("noise multiplier σ", settings.get("noise_multiplier")),
        ("clipping norm C", settings.get("max_grad_norm")),
        ("clipping", settings.get("clipping")),
        ("views of a record", settings.get("views")),
        ("sample rate q", settings.get("sample_rate")),
        ("steps", results.get("private_steps")),
        ("accountant", settings.get("accountant")),
        ("adjacency", settings.get("adjacency")),
        ("sampling", settings.get("sampling")),
        ("secure noise", settings.get("secure_noise")),
        ("self-test", settings.get("selftest")),
        ("ledger", settings.get("ledger")),
    ]
    unnoised = results.get("unnoised_metrics", ())
    logged = unnoised if isinstance(unnoised, str) else ", ".join(unnoised) or "none"
    return (
        f"{title}\n\n{_table(('parameter', 'value'), rows)}\n\n"
        "Covers the weights and all that is computed from them alone. Does not cover un-noised "
        f"training metrics in the log ({logged}), choices made by looking at the data, or "
        "validation data."
    )


def _training(settings: Mapping[str, Any]) -> str:
    rows = [
        ("attack", settings.get("attack")),
        ("ball", settings.get("ball")),
        ("eps (raw units)", settings.get("eps")),
        ("steps", settings.get("attack_steps")),
        ("step size", settings.get("attack_step_size")),
        ("other settings", settings.get("attack_settings")),
        ("objective", settings.get("objective")),
        ("share of clean records", settings.get("clean_fraction")),
        ("epochs of warm-up", settings.get("warmup_epochs")),
    ]
    rows = [(name, value) for name, value in rows if value is not None]
    return f"## Trained against\n\n{_table(('threat model', 'value'), rows)}"


def _robustness(results: Mapping[str, Any]) -> str:
    rows = [("none (clean)", results["clean_accuracy"])]
    rows += list(results["attack_accuracy"].items())
    rows.append(("worst case", results["worst_case_accuracy"]))
    table = _table(("attack", "accuracy"), [(n, f"{100 * v:.1f}%") for n, v in rows])
    return (
        f"## Measured robustness ({results['records']} validation records, "
        f"after step {results['measured_at_step']})\n\n{table}\n\n"
        "An upper bound: a stronger attack may find more. Worst case counts a record as right "
        "only if it is right clean and under every attack."
        + _masked(results.get("zero_gradients", {}))
    )


def _masked(zero_gradients: Mapping[str, float]) -> str:
    """A warning where an attack had little to go by."""
    blind = {name: share for name, share in zero_gradients.items() if share > 0}
    if not blind:
        return ""
    shares = ", ".join(f"{name} {100 * share:.1f}%" for name, share in blind.items())
    return (
        f"\n\nGradients that were zero, so that the attack could not move: {shares}. Many of them "
        "mean that the model hides its gradient, and is less robust than it looks."
    )
