"""A process that embeds by `HashingEmbedder`, at the priority of the tests, and does what some texts say."""

import os
from pathlib import Path

from retrieval.embedder import HashingEmbedder
from retrieval.embedding_child import serve
from retrieval.embedding_process import Recipe
from retrieval.errors import IndexUnavailable


class Obedient(HashingEmbedder):
    """ "crash" ends the process, "crash FILE" the first time only; "fail" is an error of the model's."""

    def encode(self, texts, kind):
        for text in texts:
            match text.split():
                case ["crash"]:
                    os.abort()
                case ["crash", file] if not Path(file).exists():
                    Path(file).touch()
                    os.abort()
                case ["fail"]:
                    raise TypeError("a broken model")
        return super().encode(texts, kind)


class Changed(HashingEmbedder):
    """Makes other vectors than the stand-in in the tests' process."""

    def encode(self, texts, kind):
        return -super().encode(texts, kind)


def load(recipe: Recipe) -> Obedient:
    if recipe.model == "absent":
        raise IndexUnavailable("The embedding model 'absent' cannot be loaded.")
    return Changed(8) if recipe.model == "changed" else Obedient(int(recipe.model))


if __name__ == "__main__":
    serve(load)
