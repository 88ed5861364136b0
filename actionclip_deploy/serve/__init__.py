"""The server: batched clip scoring over HTTP, with label banks that change while it runs.

settings.py       what can be set, and the limits, which are on by default
refusals.py       what is answered to a request that is not done, by status
encoding.py       videos and tensors -> embeddings and rows: decoding, then a shared call
decoding.py       worker processes that decode, bounded and replaced when they die
decode_process.py one of them, as the server has it; decode_worker.py: the program that it runs
spool.py          what was uploaded, as files that the workers read
arrays.py         .npy files from strangers
batcher.py        calls of a runtime that several requests share
execution.py      what a call of the batcher computes, and how large it is best
banks.py          named label banks with versions, built in the background
banks_adhoc.py    banks of the labels that a request brings along
texts.py          texts of strangers: checked, tokenized, embedded beside the clips
shared_runtime.py the runtime as threads that build banks may call it
ranking.py        embeddings and a bank -> the part of an answer that ranks labels
requests.py       what is asked of the service, and what comes out
service.py        what HTTP calls: classify, embed, info; plain Python
checks.py         tensors from strangers, before they wait for a shared call
schemas.py        requests and answers of /v1; answers.py makes the latter
forms.py          multipart (multipart_bodies.py) and JSON bodies -> requests
api_*.py          the routes; those of /v2 use
v2_models.py      graphs as the inference protocol's models
v2_bodies.py      bodies in memory, bounded together
v2_requests.py    JSON and binary tensors -> arrays; v2_answers.py the way back
v2_schemas.py     requests and answers of /v2; v2_refusals.py its form of errors
guards.py         request ids, keys, limits of bodies, disconnects; logs.py: JSON lines
app.py            the ASGI application
connections.py    connections on which nothing happens, or nobody reads; how uvicorn is set
running.py        uvicorn, and an end that finishes what was begun
metrics.py        what Prometheus reads; tracing.py what OpenTelemetry gets

Importing this package imports no web framework: the decoding processes run without one.
"""
