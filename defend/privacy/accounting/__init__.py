"""ε: privacy losses, their composition, σ for a target, the budget and the ledger."""
