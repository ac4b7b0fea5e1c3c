"""Trained students that ship with lasnn, a run folder each with its card; `lasnn list models` names them."""
