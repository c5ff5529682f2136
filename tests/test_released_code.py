"""The released code: what its text says, what follows from it, and that another text has another verdict."""

import copy
import hashlib
import json
from fractions import Fraction
from functools import partial

import pytest
import torch

from disam_theory.claims import Verdict
from disam_theory.errors import ComputationError, UsageError
from disam_theory.losses import weighted_variance
from disam_theory.models import digits_mlp
from proofs_checks.released_code import (
    BALANCED,
    COINCIDENCE,
    DEFAULTS,
    LOOP,
    NEGATIVE_IN_PRINT,
    PLAIN,
    check_defaults,
    check_modes,
    check_names,
    check_variance,
    one_weight_update,
    recorded,
    set_members,
    step,
)
from proofs_checks.released_simulation import Simulation, mode_training, variance_training
from proofs_checks.released_text import derive_facts, facts_of

TRAINER = """class Start(object):
    def initialise(self):
        self.rate = 0.1
        self.prepare()

    def epoch(self, model):
        model.eval()
        self.train(model, 3)


class Later(Start):
    def train(self, model, number):
        model.train()
        groups = list(set(domain_labels))
        return self.rate * self.never_set

    def run(self):
        if "sam" in self.args.optim or "gsam" in self.args.optim:
            self.epoch(self.args)


class FromElsewhere(torch.nn.Module):
    def forward(self, x):
        return self.inherited(x)
"""
COMPLETE = TRAINER.replace("never_set", "rate").replace("prepare", "run").replace("self.args", "options")
OPTIONS = """parser.add_argument("--rho", type=float, default=0.5)
parser.add_argument("--show", action="store_true")
parser.add_argument("--epochs", type=int)
loader = DataLoader(data, collate_fn=join)
dataset.domain_label = names.index(name)
dataset.domain_label = domain_label
"""
SOURCES = {
    "a/trainer.py": TRAINER,
    "options.py": OPTIONS,
    "readme.md": "bash run_trainer.py --rho 0.1 --epoch 5\n",
}


def altered(change):
    """The recorded facts after a change."""
    facts = copy.deepcopy(recorded()["facts"])
    change(facts)
    return facts


def both_modes(mode):
    """Both trainers' epochs in one mode."""
    return altered(lambda f: [f["modes"][f"{name}_Trainer.sam_train"].update(mode=mode) for name in ("SAM", "DISAM")])


def supplied(*names):
    """The first trainer's class with more names defined."""
    return altered(lambda f: f["classes"]["ERM_Trainer"]["defines"].extend(names))


def options(**defaults):
    """Options with other defaults."""
    return altered(lambda f: [f["options"][name].update(default=value) for name, value in defaults.items()])


MUTATIONS = {
    "code-variance-weighting": {
        "the loop goes through each label once": partial(
            check_variance, None, members=lambda labels: labels.unique().tolist()
        ),
        "as many samples of each domain": partial(check_variance, None, batches=(BALANCED,)),
        "losses at which the variances agree by chance": partial(check_variance, None, batches=(COINCIDENCE,)),
        "no set of labels in the text": partial(check_variance, None, facts=altered(lambda f: f["sets"].clear())),
        "labels that are not integers": partial(
            check_variance, None, facts=altered(lambda f: f["domain_labels"][0].update(is_index=False))
        ),
        "both trainings over domains": partial(
            check_variance, None, simulate=partial(variance_training, ("domains", "domains"))
        ),
        "trained on batches with equal counts": partial(
            check_variance, None, simulate=partial(variance_training, balanced=True)
        ),
    },
    "code-sam-eval-mode": {
        "both epochs in training mode": partial(check_modes, None, facts=both_modes("train")),
        "both epochs in evaluation mode": partial(check_modes, None, facts=both_modes("eval")),
        "a network without batch norm and dropout": partial(check_modes, None, networks={"plain": PLAIN}),
        "trained without batch norm and dropout": partial(
            check_modes, None, simulate=partial(mode_training, network=digits_mlp)
        ),
    },
    "code-missing-functions": {
        "all that is read is defined": partial(
            check_names, None, facts=supplied("get_data_aug", "data_aug", "verx_ce_loss")
        ),
        "a repository that defines what it reads": partial(check_names, None, facts=facts_of({"a.py": COMPLETE})),
    },
    "code-defaults": {
        "defaults that agree": partial(check_defaults, None, facts=options(rho=0.05, optim="sam")),
        "only what agrees is claimed": partial(
            check_defaults, None, paper={name: DEFAULTS[name] for name in ("lambda_weight", "backbone")}
        ),
        "a rho that the claimed loop does not read": partial(
            check_defaults, None, paper={"rho": DEFAULTS["rho"], LOOP: ("plain", "nowhere")}
        ),
    },
}


def test_the_facts_of_a_small_repository():
    facts = facts_of(SOURCES)
    assert facts["modes"] == {
        "Start.epoch": {"at": "a/trainer.py:7", "mode": "eval"},
        "Later.train": {"at": "a/trainer.py:13", "mode": "train"},
    }
    assert facts["sets"] == {"Later.train": {"at": "a/trainer.py:14", "line": "groups = list(set(domain_labels))"}}
    assert facts["optim_contains"] == {"Later.run": {"at": "a/trainer.py:18", "parts": ["sam", "gsam"]}}
    assert {name: option["default"] for name, option in facts["options"].items()} == {
        "rho": 0.5,
        "show": False,
        "epochs": None,
    }
    assert facts["commands"] == {"readme.md:1": {"rho": "0.1", "epochs": "5"}}
    assert facts["collate_fn"] == ["options.py:4"]
    assert facts["domain_labels"] == [
        {"at": "options.py:5", "line": "dataset.domain_label = names.index(name)", "is_index": True}
    ]
    assert set(facts["classes"]) == {"Start", "Later"}  # what the third inherits cannot be known


def test_names_are_looked_for_in_ancestors_and_descendants():
    """``prepare`` and ``never_set`` are nowhere; ``train`` is in the descendant, ``rate`` in the ancestor."""
    missing = check_names(None, facts=facts_of(SOURCES)).data["missing"]
    assert {(entry["class"], entry["name"], entry["at"]) for entry in missing} == {
        ("Start", "prepare", "a/trainer.py:4"),
        ("Later", "never_set", "a/trainer.py:15"),
        ("Later", "args", "a/trainer.py:18"),
    }


def test_a_checkout_is_read_from_disk(tmp_path):
    for path, text in SOURCES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(text.encode())
    (tmp_path / "image.png").write_bytes(b"\x89")
    assert derive_facts(tmp_path) == facts_of(SOURCES)
    assert derive_facts(tmp_path)["sha256"]["options.py"] == hashlib.sha256(OPTIONS.encode()).hexdigest()
    with pytest.raises(UsageError, match="no Python"):
        derive_facts(tmp_path / "nothing")


def test_the_record_names_its_source():
    record = recorded()
    assert len(record["commit"]) == 40
    assert set(record["facts"]) == set(facts_of(SOURCES))
    cited = [place["at"] for place in record["facts"]["modes"].values()] + list(record["facts"]["commands"])
    assert {place.split(":")[0] for place in cited} <= set(record["facts"]["sha256"])


def test_a_set_of_tensors_keeps_one_member_a_sample():
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert sorted(int(label) for label in set_members(labels)) == [0, 0, 1, 1, 1]
    assert len(set(labels.tolist())) == 2


def test_the_witness_by_hand():
    """Counts 1 and 7, losses 4 and 0: mean 1/2, variance 7/64 * 16; Eq. 6 gives 4; the first weight's sign changes."""
    entry = check_variance(None).data["batches"][0]
    assert (entry["released"], entry["eq6"]) == ("7/4", "4")
    assert Fraction(entry["beta_printed"][0]) == Fraction(1, 8) - Fraction(1, 10) * 2 < 0
    assert Fraction(entry["beta_released"][0]) == Fraction(1, 8) * (1 - Fraction(1, 5) * Fraction(7, 2)) > 0
    shares = torch.tensor(NEGATIVE_IN_PRINT.counts, dtype=torch.float64) / 8
    assert float(weighted_variance(torch.tensor([4.0, 0.0], dtype=torch.float64), shares)) == 1.75


def test_released_weights_are_the_derivatives_of_the_released_objective():
    """Central differences, exact for a quadratic, in rationals."""
    for entry in check_variance(None).data["batches"]:
        share = [Fraction(n, sum(entry["counts"])) for n in entry["counts"]]
        lam = Fraction(entry["lambda"])

        def objective(losses, share=share, lam=lam):
            mean = sum(p * x for p, x in zip(share, losses, strict=True))
            return mean - lam * sum(p * (x - mean) ** 2 for p, x in zip(share, losses, strict=True))

        for i, weight in enumerate(entry["beta_released"]):
            ends = [[x + h * (j == i) for j, x in enumerate(entry["losses"])] for h in (1, -1)]
            assert (objective(ends[0]) - objective(ends[1])) / 2 == Fraction(weight)


def test_either_sign_can_change():
    first, second = check_variance(None).data["batches"]
    assert Fraction(first["beta_printed"][0]) < 0 < Fraction(first["beta_released"][0])
    assert Fraction(second["beta_released"][0]) < 0 < Fraction(second["beta_printed"][0])
    assert first["domains_whose_weight_changes_sign"] == second["domains_whose_weight_changes_sign"] == [1]


def test_a_loop_that_goes_through_domains_computes_eq6():
    evidence = MUTATIONS["code-variance-weighting"]["the loop goes through each label once"]()
    assert evidence.verdict is Verdict.PROVED
    assert all(entry["released"] == entry["eq6"] for entry in evidence.data["batches"])


def test_members_that_do_not_give_eq6_on_equal_counts_are_an_error():
    with pytest.raises(ComputationError, match="should agree"):
        check_variance(None, members=lambda labels: [*labels.tolist(), 0, 0])


def test_steps_of_one_mode_are_equal_and_lambda_matters():
    assert torch.equal(step(PLAIN, "train", None), step(PLAIN, "eval", 0.0))
    assert not torch.equal(step(PLAIN, "train", 0.0), step(PLAIN, "train", 5.0))


def test_the_one_weight_by_hand():
    assert one_weight_update("train") == Fraction(9, 8)
    assert one_weight_update("eval") == Fraction(17, 32)
    gap = check_modes(None).data["relative_difference_at_lambda_0"]["one weight"]
    assert gap == pytest.approx(float((Fraction(9, 8) - Fraction(17, 32)) / Fraction(9, 8)), rel=1e-15)


def test_an_epoch_without_a_mode_is_undecided():
    facts = altered(lambda f: f["modes"].pop("SAM_Trainer.sam_train"))
    assert check_modes(None, facts=facts).verdict is Verdict.UNDECIDED


def test_what_is_missing_and_which_loop_the_command_selects():
    missing = {entry["name"] for entry in check_names(None).data["missing"]}
    assert {"get_data_aug", "verx_ce_loss"} <= missing
    table = {row["option"]: row for row in check_defaults(None).data["defaults"]}
    assert (table["rho"]["released"], table["rho"]["paper"]) == (0.01, 0.05)
    assert table["loop"]["command"] == "plain"
    assert check_defaults(None, facts=options(rho=0.05)).verdict is Verdict.REFUTED  # the loop alone
    assert check_defaults(None, facts=options(optim="sam")).verdict is Verdict.REFUTED  # rho alone


def test_runs_that_end_alike_refute_nothing_and_say_so():
    alike = Simulation("", 0.0, [], {})
    found = [check_variance(None, simulate=lambda: alike), check_modes(None, simulate=lambda modes: alike)]
    found.append(MUTATIONS["code-defaults"]["a rho that the claimed loop does not read"]())
    for evidence in found:
        assert evidence.verdict is Verdict.UNDECIDED
        assert "same weights" in evidence.reason
        assert "simulation" in evidence.data


def test_the_simulated_modes_are_those_of_the_text():
    asked = []
    facts = altered(lambda f: f["modes"]["DISAM_Trainer.sam_train"].update(mode="eval"))
    facts["modes"]["SAM_Trainer.sam_train"]["mode"] = "train"
    check_modes(None, facts=facts, simulate=lambda modes: asked.append(modes) or Simulation("", 1.0, [], {}))
    assert asked == [("train", "eval")]


def test_a_default_that_is_not_simulated_refutes_by_itself():
    evidence = check_defaults(None, paper={"backbone": ("vit_b_16", "nowhere"), LOOP: ("plain", "nowhere")})
    assert evidence.verdict is Verdict.REFUTED
    assert "simulation" not in evidence.data


@pytest.mark.parametrize("check", [check_variance, check_modes, check_names, check_defaults])
def test_the_evidence_is_small(check):
    assert len(json.dumps(check(None).data, allow_nan=False)) < 8000
