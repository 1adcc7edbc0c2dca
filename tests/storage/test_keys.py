"""The keys of trials."""

from pico import searcher


def test_keys_of_trials_hold_what_scores_depend_on(intents):
    trained = searcher(intents)
    trained.train_adapters()
    run = trained.run
    before = run.keys["intents"].base
    for fact in ("head", "labels", "label_template", "sides"):
        run = searcher(intents).run
        run.facts[fact] = "another"
        vars(run)["bank"] = type("Bank", (), {"training": lambda self: {}})()
        assert run.keys["intents"].base != before, fact
