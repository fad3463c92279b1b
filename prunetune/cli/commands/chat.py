"""`prunetune chat`: talk to a model folder in the terminal, or pipe questions into it, one a line."""

from __future__ import annotations

from typing import Annotated

import typer


def chat(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="model folder, e.g. runs/quickstart/compact")],
    system: Annotated[str | None, typer.Option(help="system message that opens the conversation")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token")] = 0.0,
) -> None:
    """Chat with a model folder; /new forgets the conversation, /quit (or end of input) leaves."""
    from prunetune.cli.conversation import Conversation, load, questions
    from prunetune.core.console import console, note
    from prunetune.pipeline.quiet import quiet_libraries

    quiet_libraries()

    model, tokenizer = load(folder)
    talk = Conversation(model, tokenizer, system, max_new_tokens, temperature)
    if not talk.remembers:
        note("this model has no chat template: every line is continued as plain text")
    for question in questions():
        if question == "/quit":
            break
        if question == "/new":
            talk.forget()
            note("forgotten")
            continue
        for piece in talk.answer(question):
            console().print(piece, end="", markup=False, soft_wrap=True)
        console().print()
