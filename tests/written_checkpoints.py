"""Files of weights, each written as the program writes it that it is named after; without those programs."""

import argparse
import zipfile

import numpy as np
import torch
from torch import nn

CLASSES = 7


def official_arguments():
    """``code/runs/run_trainer.py``: all the arguments that its parser has, with their defaults."""
    return argparse.Namespace(
        algorithm="DISAM_Trainer",
        backbone="resnet18",
        sub_log_dir="none",
        seed=0,
        weight_decay=0.0005,
        dataset="pacs",
        dataset_seed=0,
        test_domain="s",
        batch_size=32,
        val_batch_size=32,
        epochs=20,
        optim="sam",
        lr=0.002,
        lr_policy="step",
        rho=0.05,
        sam_alpha=0.0,
        lambda_weight=0.1,
        note="fedavg",
        display=False,
    )


def official_net(torchvision, classes=CLASSES):
    """The official ``models/resnet.py``: torchvision's ResNet, its head named ``fc_class``, with dropout before it."""
    net = torchvision.models.resnet18(num_classes=classes)
    net.fc_class, net.dropout = net.fc, nn.Dropout(0.5)
    net.fc = nn.Identity()
    trunk = net.forward
    net.forward = lambda x: net.fc_class(net.dropout(trunk(x)))
    return net


def save_official(path, net):
    """``save_checkpoint`` of the official ``ERM.py``."""
    results = {epoch: {part: {"acc": 0.5 + epoch / 10, "loss": 1.0} for part in ("val", "test")} for epoch in range(2)}
    state = {
        "args": official_arguments(),
        "epochs": 1,
        "model": net.state_dict(),
        "results": results,
        "best_acc": 0.6,
    }
    torch.save(state, path)


class Identity(nn.Module):
    def forward(self, x):
        return x


class Featurizer(nn.Module):
    """DomainBed's ``networks.ResNet``."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        del self.network.fc
        self.network.fc = Identity()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(self.network(x))


class ERM(nn.Module):
    """DomainBed's ``algorithms.ERM``: featurizer and classifier, and both again as one network."""

    def __init__(self, featurizer, features, classes):
        super().__init__()
        self.featurizer = featurizer
        self.classifier = nn.Linear(features, classes)
        self.network = nn.Sequential(self.featurizer, self.classifier)

    def forward(self, x):
        return self.network(x)


def save_domainbed(path, algorithm, classes=CLASSES):
    """``save_checkpoint`` of DomainBed's ``train.py``, with hyperparameters drawn as its registry draws them."""
    random = np.random.RandomState(0)
    torch.save(
        {
            "args": {"algorithm": "ERM", "dataset": "PACS", "test_envs": [3], "hparams": None, "seed": 0},
            "model_input_shape": (3, 224, 224),
            "model_num_classes": classes,
            "model_num_domains": 3,
            "model_hparams": {
                "resnet18": True,
                "resnet_dropout": random.choice([0.0, 0.1, 0.5]),
                "n_meta_test": random.choice([1, 2]),
                "class_balanced": np.bool_(False),
                "lr": 5e-5,
            },
            "model_dict": algorithm.state_dict(),
        },
        path,
    )


def as_numpy_1_wrote_it(path):
    """The same file with the module path that NumPy had before version 2."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def save_lightning(path, module):
    """``dump_checkpoint`` of Lightning 2's connector, with ModelCheckpoint and EarlyStopping as callbacks."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    stopping = {"wait_count": 0, "stopped_epoch": 0, "best_score": torch.tensor(0.5), "patience": 3}
    best = {
        "monitor": "val_acc",
        "best_model_score": torch.tensor(0.5),
        "best_model_path": "epoch=1.ckpt",
        "dirpath": "checkpoints",
        "best_k_models": {"epoch=1.ckpt": torch.tensor(0.5)},
        "kth_value": torch.tensor(0.5),
    }
    torch.save(
        {
            "epoch": 1,
            "global_step": 20,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": module.state_dict(),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1, "completed": 1}}}},
            "callbacks": {"EarlyStopping{'monitor': 'val_acc'}": stopping, "ModelCheckpoint{'mode': 'max'}": best},
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": {"lr": 0.1, "classes": 10},
        },
        path,
    )
