"""``POST /v1/votes``, ``POST /v1/votes/undo`` and ``GET /v1/votes``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from lightning_rlhf.serving.errors import ApiError, json_response
from lightning_rlhf.serving.server import Server
from lightning_rlhf.serving.tally import tally
from lightning_rlhf.serving.vote_schema import UndoBody, VoteBody
from lightning_rlhf.serving.votes import preferences, unpaired


def vote_routes(server: Server) -> APIRouter:
    """Makes the routes. They are no coroutines, so that waiting for the disk holds up no stream."""
    router, votes, hashes = APIRouter(), server.votes, server.hashes

    @router.post("/v1/votes")
    def vote(body: VoteBody) -> Response:
        found = body.model_dump(exclude_none=True)
        found["messages"] = [turn.message for turn in body.messages]
        for answer in found["answers"]:
            answer["weights"] = hashes.of(answer["model"])
        try:
            row = votes.add(found)
        except OSError as error:
            raise _failed("written", error) from error
        made = {"preferences": len(preferences(row)), "unpaired": len(unpaired(row))}
        return json_response({"object": "vote", "id": row["id"], "time": row["time"], **made})

    @router.post("/v1/votes/undo")
    def undo(body: UndoBody) -> Response:
        try:
            votes.undo(body.id)
        except KeyError:
            raise ApiError(404, f"There is no vote {body.id!r}, or it was taken back.", "id") from None
        except (OSError, ValueError) as error:
            raise _failed("taken back", error) from error
        return json_response({"object": "vote.undone", "id": body.id})

    @router.get("/v1/votes")
    def summary() -> Response:
        try:
            return json_response({**tally(votes.read()), "folder": str(votes.folder)})
        except (OSError, ValueError) as error:
            raise _failed("read", error) from error

    return router


def _failed(what: str, error: Exception) -> ApiError:
    return ApiError(500, f"The votes cannot be {what}: {error}", code="votes_failed")
