"""On a GPU: one step of an attack, captured once and replayed."""
