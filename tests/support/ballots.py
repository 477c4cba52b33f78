"""Votes, as the chat page makes them."""

PROMPT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who was Ben?"}]


def answer(model, content, **more):
    return {"model": model, "content": content, **more}


def ballot(vote="left", left="A dog.", right="A cat.", prompt=PROMPT, **more):
    answers = [answer("sft", left, reward=1.0, seed=3), answer("ppo", right, reward=-1.0, seed=3)]
    return {"messages": prompt, "answers": answers, **({"vote": vote} if vote else {}), **more}


def thumb(vote, content="A dog."):
    return {"messages": PROMPT, "answers": [answer("sft", content)], "vote": vote}
