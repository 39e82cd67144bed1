"""Every table and figure of the papers that the library covers, with the command that makes it.

  python -m experiments.catalogue                 all of them
  python -m experiments.catalogue --implemented   those that can be run

Commands that start from ``--preset=paper`` need an accelerator and the prepared data set; with
``--dry_run`` they build everything anywhere. Where a table is said to be there in part, the rows
that its command makes are named.
"""

import dataclasses
from typing import NamedTuple

from experiments import command_line
from experiments.command_line import setting
from robustjax.training import report

TRAINING = "python -m experiments.adversarial_training"
SOAR = "python -m experiments.soar"
FAST = "python -m experiments.fast_adversarial_training"
OPTIMIZER = "python -m experiments.optimizer_robustness"
IMPLICIT = "python -m experiments.implicit_robustness"

OUTER = "Dabouei et al. 2022, Revisiting outer optimization in adversarial training"
FAST_AT = "Andriushchenko 2024, Understanding generalization and robustness, ch. 2 (fast training)"
SQUARE = "Andriushchenko 2024, Understanding generalization and robustness, ch. 3 (Square Attack)"
ROBUSTBENCH = "Andriushchenko 2024, Understanding generalization and robustness, ch. 4 (benchmark)"
STRUCTURES = "Sanyal 2021, Identifying and exploiting structures for reliable deep learning"
BRIDGING = "Faghri et al. 2021, Bridging adversarial robustness and optimization bias"
SECOND_ORDER = "Ma 2025, Understanding adversarial robustness in deep learning, ch. 3 (SOAR)"
OPTIMIZERS = "Ma 2025, Understanding adversarial robustness in deep learning, ch. 4 (optimizers)"
DEMO = "robustjax"

ENGM = "python -m experiments.engm"
EVALUATE = "python -m experiments.evaluate"
CURVES = "python -m experiments.attack_curves"
FOURIER = "python -m experiments.fourier_attack"
STUDY = "python -m experiments.square_attack"


class Entry(NamedTuple):
    """A table or figure: where it stands, what it shows, how to make it, and how much is there."""

    paper: str
    item: str
    content: str
    status: str  # "yes", "part: ..." or "no"
    commands: tuple[str, ...] = ()


def fast(study: str) -> tuple[str, str]:
    """Small and published runs of a study of fast adversarial training."""
    return f"{FAST} --study={study}", f"{FAST} --preset=paper --study={study}"


def soar(study: str) -> tuple[str, str]:
    """Small and published runs of a study of SOAR."""
    return f"{SOAR} --study={study}", f"{SOAR} --preset=paper --study={study}"


def optimizer(study: str) -> tuple[str, str]:
    """Small and published runs of a study of optimizers."""
    return f"{OPTIMIZER} --study={study}", f"{OPTIMIZER} --preset=paper --study={study}"


def implicit(study: str) -> tuple[str, str]:
    """Small and published runs of a study of implicit robustness."""
    return f"{IMPLICIT} --study={study}", f"{IMPLICIT} --preset=paper --study={study}"


CATALOGUE = (
    Entry(DEMO, "demo", "standard and adversarial training side by side, MNIST-5k, l_inf 0.2",
          "yes", (TRAINING,)),
    Entry(DEMO, "evaluation", "AutoAttack on a robust network, MNIST-5k, l_inf 0.2", "yes",
          (EVALUATE,)),
    Entry(DEMO, "curves", "robust accuracy over eps for every attack", "yes",
          (CURVES, f"{CURVES} --threat=l2 --eps_max=3 --workdir=runs/attack_curves/l2 "
           "--attacks=pgd,apgd-t,autoattack,fab,deepfool,cw")),
    Entry(DEMO, "Fourier", "Fourier-l_inf attacks on four small networks", "yes", (FOURIER,)),
    Entry(OUTER, "Table 1", "time per iteration of seven outer optimizers", "yes",
          ("python -m benchmarks.outer_optimizers",)),
    Entry(OUTER, "Table 2", "seven outer optimizers, vanilla adversarial training, CIFAR-10", "yes",
          (f"{ENGM} --study=optimizers", f"{ENGM} --preset=mnist",
           f"{ENGM} --preset=paper --study=optimizers")),
    Entry(OUTER, "Table 3", "Vanilla, TRADES, MART, AWP x MSGD, ENGM", "yes",
          (f"{ENGM} --study=methods", f"{ENGM} --preset=paper --study=methods")),
    Entry(OUTER, "Table 4", "comparison on WRN-34-10", "part: AWP with MSGD, N-ENGM, ENGM",
          (f"{ENGM} --preset=paper --study=sota",)),
    Entry(OUTER, "Table 5", "gradient statistics and DeepFool distance over eps", "yes",
          (f"{ENGM} --study=eps", f"{ENGM} --preset=paper --study=eps")),
    Entry(OUTER, "Fig. 1", "gain of robust accuracy", "yes",
          (f"{ENGM} --study=optimizers", f"{ENGM} --preset=paper --study=optimizers")),
    Entry(OUTER, "Fig. 2", "mean and variance of gradient norms over epochs", "yes",
          (f"{ENGM} --study=gradients", f"{ENGM} --preset=paper --study=gradients")),
    Entry(OUTER, "Fig. 3", "correlation of gradient norms, error of estimated weights", "yes",
          (f"{ENGM} --study=gradients", f"{ENGM} --preset=paper --study=gradients")),
    Entry(OUTER, "Fig. 4", "loss landscapes", "yes",
          (f"{ENGM} --study=landscape", f"{ENGM} --preset=paper --study=optimizers,landscape")),
    Entry(OUTER, "Fig. 5", "ablations and learning curves", "yes",
          (f"{ENGM} --study=optimizers,alpha,tau,beta,weight_decay",
           f"{ENGM} --preset=paper --study=optimizers,alpha,tau,beta,weight_decay")),
    Entry(OUTER, "Supplement", "the l_2 threat model, eps = 128/255", "yes",
          (f"{ENGM} --study=l2", f"{ENGM} --preset=paper --study=l2")),
    Entry(OUTER, "Theorem 2", "descent with gradient noise of infinite variance", "yes",
          (f"{ENGM} --study=convergence",)),
    Entry(OUTER, "all", "everything at small size: noisy digits, claim by claim", "yes", (ENGM,)),
    Entry(FAST_AT, "Figs. 2.1, 2.8, 2.14", "robust accuracy of fast methods over eps, CIFAR-10 and "
          "SVHN, with and without early stopping", "yes", fast("eps")),
    Entry(FAST_AT, "Fig. 2.2", "norm of FGSM with a random start (Lemma 1)", "yes",
          (f"{FAST} --study=start",)),
    Entry(FAST_AT, "Table 2.1", "FGSM with a reduced step against FGSM-RS", "yes",
          fast("reduced_step")),
    Entry(FAST_AT, "Fig. 2.3", "FGSM with smaller steps at larger radii",
          "part: PGD-50-10 at 8/255 in the paper preset",
          (f"{FAST} --study=reduced_step", f"{FAST} --preset=paper --study=steps")),
    Entry(FAST_AT, "Sec. 2.4", "PGD-10 with perturbations pushed to the corners", "yes",
          (f"{FAST} --study=methods", f"{FAST} --preset=paper --study=corners")),
    Entry(FAST_AT, "Fig. 2.4", "training curves: accuracies, losses, gradient alignment", "yes",
          fast("curves")),
    Entry(FAST_AT, "Figs. 2.5, 2.6, 2.7, 2.12, 2.13", "filters and feature maps of a single-layer "
          "CNN", "yes", (f"{FAST} --study=filters,feature_maps",
           f"{FAST} --preset=paper --study=filters,feature_maps")),
    Entry(FAST_AT, "Fig. 2.11", "catastrophic overfitting of a single-layer CNN", "yes",
          (f"{FAST} --study=curves", f"{FAST} --preset=paper --study=single_layer")),
    Entry(FAST_AT, "Fig. 2.9", "gradient alignment at initialisation (Lemma 2)", "yes",
          (f"{FAST} --study=initialization",)),
    Entry(FAST_AT, "Fig. 2.10", "quality of the linear approximation",
          "yes", (f"{FAST} --study=linearization",
                  f"{FAST} --preset=paper --study=curves,linearization")),
    Entry(FAST_AT, "Table 2.2", "the weight of GradAlign over eps", "yes", fast("eps")),
    Entry(FAST_AT, "Table 2.3", "PGD-2 with and without random start", "yes",
          (f"{FAST} --study=methods", f"{FAST} --preset=paper --study=pgd2")),
    Entry(FAST_AT, "Tables 2.4, 2.5", "fast adversarial training on CIFAR-10 at 8/255 and 16/255, "
          "on SVHN at 8/255 and 12/255", "part: without the quoted rows (YOPO, LLR-2)",
          fast("methods")),
    Entry(FAST_AT, "Table 2.6", "ImageNet, ResNet-50, 2/255 to 6/255", "yes",
          (f"{FAST} --preset=paper --study=imagenet",)),
    Entry(FAST_AT, "Table 2.7", "FGSM + GradAlign at 24/255 and 32/255", "yes",
          fast("large_eps")),
    Entry(FAST_AT, "Table 2.8", "FGSM with gradient penalty, CURE, GradAlign", "yes",
          fast("penalties")),
    Entry(FAST_AT, "Fig. 2.15", "the weight of GradAlign", "yes", fast("weight")),
    Entry(FAST_AT, "Fig. 2.16", "GradAlign over the number of epochs", "yes", fast("epochs")),
    Entry(FAST_AT, "Sec. 2.11.5", "GradAlign at FGSM points; GradAlign and CURE without attack",
          "yes", fast("variants")),
    Entry(SECOND_ORDER, "Sec. 3.2", "linear regression in more dimensions than the data", "yes",
          (f"{SOAR} --study=linear",)),
    Entry(SECOND_ORDER, "Tables 3.1, F", "confidence and other signs of masked gradients", "yes",
          soar("masking")),
    Entry(SECOND_ORDER, "Table 3.2", "accuracy under white-box attacks", "yes", soar("methods")),
    Entry(SECOND_ORDER, "Table 3.3", "transferred examples and SimBA", "yes", soar("transfer")),
    Entry(SECOND_ORDER, "Table 3.4", "the members of AutoAttack, each on its own", "yes",
          soar("autoattack")),
    Entry(SECOND_ORDER, "Table 3.5", "forward and backward passes",
          "part: without the times of the paper's GPU",
          (f"{SOAR} --study=passes", "python -m benchmarks.objectives")),
    Entry(SECOND_ORDER, "Table 3.6", "the loss over the number of vectors z", "yes",
          soar("samples")),
    Entry(SECOND_ORDER, "Tables 3.7, 3.8", "evaluation points of SOAR and FOAR", "yes",
          (f"{SOAR} --study=methods", f"{SOAR} --preset=paper --study=points")),
    Entry(SECOND_ORDER, "Table 3.9", "l_2 attacks", "yes", soar("l2")),
    Entry(SECOND_ORDER, "Table 3.10", "networks of growing capacity", "yes", soar("capacity")),
    Entry(SECOND_ORDER, "Sec. 3.6", "limitations: batch normalisation, a cold start", "yes",
          soar("limitations")),
    Entry(SQUARE, "Figs. 3.1, 3.4, 3.6", "success rate over queries",
          "part: Square and SimBA, on CIFAR-10 and digits",
          (f"{STUDY} --study=curves", f"{STUDY} --preset=paper --study=curves")),
    Entry(SQUARE, "Table 3.3", "queries on the points that all attacks broke",
          "part: Square and SimBA, on CIFAR-10 and digits", (f"{STUDY} --study=curves",)),
    Entry(SQUARE, "Tables 3.1, 3.7", "ablations of windows, signs, updates, first points",
          "part: CIFAR-10 and digits in place of ImageNet",
          (f"{STUDY} --study=ablation", f"{STUDY} --preset=paper --study=ablation")),
    Entry(SQUARE, "Fig. 3.5", "sensitivity to the first share of pixels",
          "part: CIFAR-10 and digits in place of ImageNet",
          (f"{STUDY} --study=p", f"{STUDY} --preset=paper --study=p")),
    Entry(SQUARE, "Tables 3.4, 3.5", "robust MNIST models, white-box against black-box",
          "part: PGD, SimBA and Square, a smaller network",
          (f"{STUDY} --study=robust", f"{STUDY} --preset=paper --study=robust")),
    Entry(SQUARE, "Table 3.8", "stability over ten seeds", "part: MNIST, CIFAR-10 and digits",
          (f"{STUDY} --study=seeds", f"{STUDY} --preset=paper --study=seeds")),
    Entry(SQUARE, "Table 3.9", "targeted: cross-entropy against margin",
          "part: Square, on CIFAR-10 and digits",
          (f"{STUDY} --study=targeted", f"{STUDY} --preset=paper --study=targeted")),
    Entry(SQUARE, "Fig. 3.8", "perturbations after 10, 100 and 500 queries",
          "part: MNIST and digits",
          (f"{STUDY} --study=steps", f"{STUDY} --preset=paper --study=steps")),
    Entry(SQUARE, "Props. 3.5.1, 3.5.2", "random search and its bound; why squares", "yes",
          (f"{STUDY} --study=theory",)),
    Entry(DEMO, "masking", "scaled logits blind PGD and not Square", "yes",
          (f"{STUDY} --study=masking",)),
    Entry(ROBUSTBENCH, "Tables 4.3, 4.4", "leaderboards: AutoAttack on CIFAR-10, l_inf and l_2",
          "part: any model of the zoo with a ResNet, PreAct-ResNet or WideResNet, from its file",
          (f"{EVALUATE} --preset=paper --torch_checkpoint=FILE.pt --model=wrn28",
           f"{EVALUATE} --preset=paper --torch_checkpoint=FILE.pt --model=wrn28 --threat=l2 "
           "--eps=0.5 --workdir=runs/evaluate/l2")),
    Entry(ROBUSTBENCH, "Sec. 4.4.1", "warnings of an evaluation", "yes", (EVALUATE,)),
    Entry(STRUCTURES, "Fig. 3.1", "accuracies along the steps of Iter-LL-FGSM and Iter-FGSM",
          "yes",
          (f"{TRAINING} --preset=paper --model=resnet18 --objective=standard "
           "--workdir=runs/attack_curves/models", f"{CURVES} --preset=paper")),
    Entry(BRIDGING, "Figs. 5.2, B.1, Table B.1", "maximal eps of linear models by optimizer and "
          "regulariser", "yes", implicit("sweep")),
    Entry(BRIDGING, "Figs. 5.3, B.2", "maximal Fourier-l_inf eps, linear convolutions", "yes",
          implicit("fourier")),
    Entry(BRIDGING, "Sec. 5.6.1", "what linear convolutions lack", "yes",
          (f"{IMPLICIT} --study=gap",)),
    Entry(BRIDGING, "Fig. 5.4 (a, b)", "adversarial training and an l_1 penalty, by their size",
          "yes", implicit("at,penalty")),
    Entry(BRIDGING, "Fig. 5.4 (c, d)", "adversarial training and TRADES of networks", "yes",
          implicit("networks_eps,networks_trades")),
    Entry(BRIDGING, "Sec. 5.2, App. B.1, B.4, Fig. B.9", "saddle points, slack, first-order "
          "margins of networks, norm balls", "yes",
          (f"{IMPLICIT} --study=saddle,slack,first_order,balls,precond",)),
    Entry(BRIDGING, "Fig. 5.1, B.3-B.8", "images under l_inf and Fourier-l_inf attacks (with "
          "--torch_checkpoints of the published models)", "yes", (f"{FOURIER} --preset=paper",)),
    Entry(BRIDGING, "Fig. 5.5, Table B.2", "maximal eps of robust models under the Fourier-l_inf "
          "attack", "part: 23 of the 25 models, from their published checkpoints on disk",
          (f"{IMPLICIT} --study=zoo", f"{IMPLICIT} --preset=paper --study=zoo --zoo=FOLDER")),
    Entry(OPTIMIZERS, "Tables 4.1, 4.3, Fig. 4.1", "robustness and Lipschitz bounds of SGD, Adam "
          "and RMSProp", "yes", optimizer("robustness")),
    Entry(OPTIMIZERS, "Table 4.4", "BatchNorm", "yes", optimizer("batchnorm")),
    Entry(OPTIMIZERS, "Table 4.5", "the head of a ViT", "yes",
          (f"{OPTIMIZER} --study=head",
           f"{OPTIMIZER} --preset=paper --study=head --pretrained=FILE")),
    Entry(OPTIMIZERS, "Table 4.6", "speech commands", "yes", optimizer("audio")),
    Entry(OPTIMIZERS, "Table 4.7", "SGD with momentum", "yes", optimizer("momentum")),
    Entry(OPTIMIZERS, "Figs. 4.2, 4.10", "spectral energy of images", "yes", optimizer("energy")),
    Entry(OPTIMIZERS, "Fig. 4.3", "training on filtered images", "yes", optimizer("filters")),
    Entry(OPTIMIZERS, "Figs. 4.4, 4.11 to 4.16, 4.18 to 4.20", "filtered and attacked images",
          "yes", optimizer("panels,perturbed")),
    Entry(OPTIMIZERS, "Figs. 4.5, 4.6, 4.17", "noise in ten bands of frequencies", "yes",
          optimizer("bands")),
    Entry(OPTIMIZERS, "Figs. 4.7, 4.8, 4.9, Table 4.9", "linear regression, GD and signGD", "yes",
          (f"{OPTIMIZER} --study=dynamics,regions",)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to show."""

    implemented: bool = setting(False, "only what can be run, in whole or in part", "output")


def main(settings: Settings) -> None:
    """Prints the catalogue, a table for each paper."""
    shown = [e for e in CATALOGUE if e.status != "no" or not settings.implemented]
    for paper in dict.fromkeys(entry.paper for entry in shown):
        rows = [
            [entry.item, entry.content, entry.status] for entry in shown if entry.paper == paper
        ]
        report.print_table(paper, ["item", "content", "implemented"], rows)
        items: dict[str, list[str]] = {}
        for entry in shown:
            for command in entry.commands if entry.paper == paper else ():
                items.setdefault(command, []).append(entry.item)
        report.print_lines(*(f"{', '.join(who)}: {command}" for command, who in items.items()))
        report.print_lines("")
    done = sum(entry.status == "yes" for entry in CATALOGUE)
    partly = sum(entry.status.startswith("part") for entry in CATALOGUE)
    report.print_lines(
        f"{len(CATALOGUE)} tables and figures: {done} in whole, {partly} in part, "
        f"{len(CATALOGUE) - done - partly} not yet"
    )


if __name__ == "__main__":
    command_line.run(main, Settings, {"default": Settings()}, __doc__)
