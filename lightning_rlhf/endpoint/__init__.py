"""Asking language models over HTTP, with a ledger of what was asked and a budget. Names load when they are used."""

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.endpoint.budget import Budget, BudgetExceeded
    from lightning_rlhf.endpoint.client import Endpoint, EndpointError
    from lightning_rlhf.endpoint.ledger import Ledger, LedgerError, Totals
    from lightning_rlhf.endpoint.requests import ChatRequest, Reply, Usage

_HOMES = {
    "Budget": "budget",
    "BudgetExceeded": "budget",
    "ChatRequest": "requests",
    "Endpoint": "client",
    "EndpointError": "client",
    "Ledger": "ledger",
    "LedgerError": "ledger",
    "Reply": "requests",
    "Totals": "ledger",
    "Usage": "requests",
}
__all__ = [
    "Budget",
    "BudgetExceeded",
    "ChatRequest",
    "Endpoint",
    "EndpointError",
    "Ledger",
    "LedgerError",
    "Reply",
    "Totals",
    "Usage",
]

__getattr__ = loader(__name__, _HOMES)
