"""One gradient a record: hooks, the rule of each kind of layer, and what collects them."""
