"""What a pure fold may import: aggregates, projections, processes, their ids and refusals."""
