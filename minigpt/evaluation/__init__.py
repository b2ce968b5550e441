"""Numbers about a model: loss on every token and on answers alone, exact match, character F1."""
