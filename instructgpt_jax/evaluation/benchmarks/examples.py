"""The few-shot examples of a document: drawn from what has nothing in common with it."""

from lm_eval.api.samplers import ContextSampler


class Apart(ContextSampler):
    """Draws documents of other groups: another passage, another context.

    The harness leaves out the document itself alone, and that only where the examples come from the set that is asked.
    Without a training set at hand that is so, and there another question about the same passage would tell the answer.
    """

    def sample(self, n: int, eval_doc: dict | None = None, df=None, **_) -> list[dict]:
        """n documents, one of a group at most.

        Raises:
          ValueError: fewer than n such groups.
        """
        if df:
            self.replace_df(df)
        chosen, seen = [], {eval_doc["group"]} if eval_doc else set()
        documents = self.fewshot_docs()
        for number in self.rnd.sample(range(len(documents)), len(documents)) if n else ():
            document = documents[number]
            if document["group"] not in seen:
                chosen.append(document)
                seen.add(document["group"])
            if len(chosen) == n:
                break
        if len(chosen) < n:
            raise ValueError(f"num_fewshot must be at most the {len(chosen)} groups of other documents, got {n}")
        return chosen
