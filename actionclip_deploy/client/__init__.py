"""The client of `actionclip serve`: the API of /v1 with retries, in two forms.

answers.py     what comes back: frozen dataclasses, and the JSON that they are read from
uploads.py     what is sent as files, so that it can be sent again
exchange.py    one request with its retries, as steps that somebody else carries out
operations.py  what can be asked, as such steps
sending.py     carries out one step with httpx
blocking.py    `Client`; asynchronous.py: `AsyncClient`

Importing this package does not import httpx; making a client does.
"""

from actionclip_deploy.client.answers import (
    BankBuild,
    BankState,
    BankVersion,
    RefusedVideo,
    ServerEmbeddings,
    ServerPrediction,
    TemplateVote,
    UsedBank,
)
from actionclip_deploy.client.asynchronous import AsyncClient
from actionclip_deploy.client.blocking import Client

__all__ = [
    "AsyncClient",
    "BankBuild",
    "BankState",
    "BankVersion",
    "Client",
    "RefusedVideo",
    "ServerEmbeddings",
    "ServerPrediction",
    "TemplateVote",
    "UsedBank",
]
