"""What Foldline costs beside the bare machinery under it: each figure interleaved with its ceiling.

`python -m tests.bench --help` tells how to run it. The parts:

- `load.py`: the load generator, a process of its own: one grpc.aio channel on uvloop, any number of callers.
- `echo.py`: the ceiling of RPCs: a bare grpc.aio server that answers with the bytes it got.
- `bare_write.py`: the ceiling of writes: psycopg statements that put the same rows into the same tables.
- `bare_catch_up.py`: the ceiling of projections: one loop that reads, folds and writes the same tables.
- `transfers.py`, `peer.py` with `peer_dbos.py` and `peer_restate.py`, `versus_peers.py`: transfers, beside those of DBOS and of
  Restate, in an environment of their own.
- `healing.py`: how long a process that was killed is missed.
- `telemetry.py`: what telemetry costs a command, in `switched_write_service.py`, which turns it off and on as it serves.
- `workload.py`: the requests and rows that all of them use. `children.py`: processes, and what they cost.
- `stage.py`: engines, databases and Foldline's processes. `rows.py`: what is measured. `report.py`: what is printed.
"""
