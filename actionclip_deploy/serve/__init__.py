"""The server: batched clip scoring over HTTP, with label banks that change while it runs.

settings.py       what can be set, and the limits, which are on by default
refusals.py       what is answered to a request that is not done, by status
decoding.py       worker processes that decode, bounded and replaced when they die
decode_worker.py  the program that such a process runs
spool.py          what was uploaded, as files that the workers read
arrays.py         .npy files from strangers
batcher.py        calls of a runtime that several requests share
execution.py      what a call of the batcher computes, and how large it is best
banks.py          named label banks with versions, built in the background
banks_adhoc.py    banks of the labels that a request brings along
scoring_answers.py  embeddings and a bank -> the part of an answer that ranks labels
service.py        what HTTP calls: classify, embed, info; plain Python
schemas.py        requests and answers of /v1
forms.py          multipart and JSON bodies -> requests
api_*.py          the routes
guards.py         request ids, keys, limits of bodies, disconnects, logs
app.py            the ASGI application
running.py        uvicorn, and an end that finishes what was begun
metrics.py        what Prometheus reads; tracing.py what OpenTelemetry gets

Importing this package imports no web framework: the decoding processes run without one.
"""
