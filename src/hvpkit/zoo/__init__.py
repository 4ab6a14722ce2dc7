"""Small networks and data sets to try things on, and a loop that trains them."""

from hvpkit.zoo.absa_nets import c1, c2
from hvpkit.zoo.cifar import cifar10, cifar100
from hvpkit.zoo.classifier_training import train_classifier
from hvpkit.zoo.resnet import cifar_resnet, resnet18_cifar
from hvpkit.zoo.sklearn_digits import digits
from hvpkit.zoo.small_networks import digits_cnn, mlp
from hvpkit.zoo.transformer import tiny_gpt, tiny_vit

__all__ = [
    "c1",
    "c2",
    "cifar10",
    "cifar100",
    "cifar_resnet",
    "digits",
    "digits_cnn",
    "mlp",
    "resnet18_cifar",
    "tiny_gpt",
    "tiny_vit",
    "train_classifier",
]
