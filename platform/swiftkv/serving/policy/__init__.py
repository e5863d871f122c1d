"""The policy that sizes a prefill pool and a decode pool together: a pure function of what is observed.

    observation ─► demand ─► prefill ─┐
                     │                ├─► damping ─► budget ─► Decision
                     └─────► decode ──┘

`decision.decide` is the way in. Reads no clock, does no I/O, and imports neither torch, ray nor vllm, so that a
decision can be tested in milliseconds and simulated at any size.
Called by: serving/autoscaling.py, capacity.
"""
