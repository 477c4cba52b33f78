"""The chat itself: reads lines, streams answers, obeys commands."""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_rlhf.arguments import did_you_mean
from lightning_rlhf.chat.client import Answer, ChatError, Client
from lightning_rlhf.chat.conversation import Conversation
from lightning_rlhf.data.formats import Message

HELP = """\
  /model NAME ...     ask these models from now on; several answer the same question side by side
  /system TEXT        set the system prompt; without TEXT: remove it
  /temperature X      0 is greedy; more gives more diverse answers
  /regen              ask the last question again, with a new seed
  /undo               take the last question and its answers back
  /better NAME        this model's answer was better: a preference for training; the chat goes on with it
  /good [NAME]        a good answer
  /bad [NAME]         a bad answer
  /save FILE          write the conversation as a row of messages
  /help, /quit        Ctrl-C stops an answer, Ctrl-D ends the chat"""


@dataclass
class Terminal:
    """A chat in a terminal.

    Args:
        client: The server.
        models: The models that answer, the first of which leads the conversation.
        conversation: What was said before.
        sampling: Fields of requests, such as ``temperature``.
        history: File in which the conversation is kept after each answer.
        write: Writes text to the terminal.
    """

    client: Client
    models: list[str]
    conversation: Conversation = field(default_factory=Conversation)
    sampling: dict[str, Any] = field(default_factory=dict)
    history: Path | None = None
    write: Callable[[str], object] = print

    def __post_init__(self) -> None:
        self._known = self.client.models()
        self._check(self.models)
        self._extras = self.client.extras()
        self._asked: dict[str, Any] = {}  # what the answers were made of, whatever was set since

    def run(self, read: Callable[[], str]) -> None:
        """Reads and answers lines until the end of the input or ``/quit``.

        Args:
            read: Returns the next line; raises ``EOFError`` at the end.
        """
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.write("\n(/quit ends the chat)\n")
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._obey(line)
                elif line:
                    self.ask(line)
            except (ChatError, OSError, ValueError) as error:
                self.write(f"{error}\n")

    def ask(self, question: str) -> None:
        """Lets all models answer a question, and keeps the answer of the first."""
        chat, seed = self.conversation, secrets.randbits(31)
        before = [*chat.turns], chat.answers
        chat.turns.append(Message(role="user", content=question))
        chat.answers = [Answer(model, seed) for model in self.models]
        self._asked = {"messages": chat.prompt, "sampling": {**self.sampling}}
        try:
            self._stream(chat.answers, chat.prompt)
        except BaseException:
            chat.turns, chat.answers = before  # the question has no answer
            raise
        chat.keep(chat.answers[0])
        self._keep()

    def _stream(self, answers: Sequence[Answer], messages: list[Message]) -> None:
        """Shows answers one below the other, each as it comes; all are made at the same time."""
        stopped = threading.Event()
        pieces: list[queue.Queue[str | Exception | None]] = [queue.Queue() for _ in answers]

        def fetch(answer: Answer, pipe: queue.Queue[str | Exception | None]) -> None:
            try:
                stream = self.client.stream(answer, messages, {**self.sampling, **self._extras})
                for text in stream:
                    if stopped.is_set():
                        stream.close()
                        return
                    pipe.put(text)
                pipe.put(None)
            except Exception as error:
                pipe.put(error)

        threads = [threading.Thread(target=fetch, args=pair, daemon=True) for pair in zip(answers, pieces, strict=True)]
        for thread in threads:
            thread.start()
        try:
            for answer, pipe in zip(answers, pieces, strict=True):
                self.write(f"{answer.model}: ")
                while (piece := pipe.get()) is not None:
                    if isinstance(piece, Exception):
                        raise piece
                    self.write(piece)
                self.write(f"\n{_footnote(answer)}")
        except KeyboardInterrupt:
            self.write("\n(stopped)\n")
            for answer in answers:
                answer.finish_reason = answer.finish_reason or "stopped"
        finally:
            stopped.set()

    # ------------------------------------------------------------------------------------------------- commands

    def _obey(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "model": self._choose,
            "system": self._set_system,
            "temperature": self._set_temperature,
            "regen": self._again,
            "undo": self._undo,
            "save": self._save,
            "good": lambda given: self._thumb("good", given),
            "bad": lambda given: self._thumb("bad", given),
            "better": self._better,
            "help": lambda given: self._say(HELP),
        }
        if name not in commands:
            raise ValueError(f"There is no command /{name}{did_you_mean(name, commands)} /help lists all.")
        commands[name](rest.strip())

    def _say(self, text: str) -> None:
        self.write(f"{text}\n")

    def _check(self, models: Sequence[str]) -> None:
        if unknown := [name for name in models if name not in self._known]:
            near = did_you_mean(unknown[0], self._known)
            raise ValueError(f"There is no model {unknown[0]}{near} There are: {', '.join(self._known)}.")

    def _choose(self, given: str) -> None:
        names = given.split()
        if names:
            self._check(names)
            self.models = list(dict.fromkeys(names))
        self._say(f"(asking {', '.join(self.models)}; there are {', '.join(self._known)})")

    def _set_system(self, given: str) -> None:
        self.conversation.system = given
        self._keep()

    def _set_temperature(self, given: str) -> None:
        try:
            value = float(given)
        except ValueError:
            raise ValueError(f"/temperature needs a number, such as 0.7; got {given!r}.") from None
        if not 0 <= value <= 100:
            raise ValueError(f"/temperature must be from 0 to 100; got {given}.")
        self.sampling["temperature"] = value

    def _again(self, given: str) -> None:
        chat = self.conversation
        before, asked = ([*chat.turns], chat.answers), self._asked
        if (question := chat.ask_again()) is None:
            raise ValueError("There is no question to ask again.")
        try:
            self.ask(question)
        except BaseException:
            (chat.turns, chat.answers), self._asked = before, asked
            raise

    def _undo(self, given: str) -> None:
        if not self.conversation.turns:
            raise ValueError("There is nothing to take back.")
        self.conversation.undo()
        self._keep()

    def _save(self, given: str) -> None:
        if not given:
            raise ValueError("/save needs a file, such as /save chat.jsonl.")
        self.conversation.save(Path(given))
        self._say(f"(saved to {given})")

    def _thumb(self, vote: str, given: str) -> None:
        self._vote({"answers": [asdict(self._answer(given))], "vote": vote})

    def _better(self, given: str) -> None:
        chosen = self._answer(given)
        if len(self.conversation.answers) < 2:
            raise ValueError("/better needs two answers. Choose two models by /model, and ask again.")
        if not given:
            raise ValueError(f"/better needs a name: {' or '.join(a.model for a in self.conversation.answers)}.")
        shown = self.conversation.answers
        for other in shown:
            if other is not chosen:  # in the order in which they were shown
                pair = [answer for answer in shown if answer is chosen or answer is other]
                vote = "left" if pair[0] is chosen else "right"
                self._vote({"answers": [asdict(answer) for answer in pair], "vote": vote})
        self.conversation.keep(chosen)
        self._keep()

    def _answer(self, name: str) -> Answer:
        answers = {answer.model: answer for answer in self.conversation.answers}
        if not answers:
            raise ValueError("There is no answer yet.")
        if name and name not in answers:
            raise ValueError(f"{name} has not answered{did_you_mean(name, answers)} There are: {', '.join(answers)}.")
        return answers[name] if name else self.conversation.answers[0]

    def _vote(self, vote: dict[str, Any]) -> None:
        for answer in vote["answers"]:
            for key in [key for key, value in answer.items() if value is None]:
                del answer[key]
        found = self.client.vote({**vote, **self._asked})
        self._say(f"(saved: {found['preferences']} preferences, {found['unpaired']} single answers)")

    def _keep(self) -> None:
        if self.history is not None:
            self.conversation.save(self.history)


def _footnote(answer: Answer) -> str:
    """Returns a line on an answer's score, and on what ended it if that was not the model."""
    notes = [] if answer.reward is None else [f"reward {answer.reward:.2f}"]
    if answer.finish_reason == "length":
        notes.append("cut at the length limit")
    return f"  ({', '.join(notes)})\n" if notes else ""
