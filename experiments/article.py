"""The article's program in Keras, as a beginner would type it: what `make bench` compares with.

    python experiments/article.py FOLDER      # with MNIST's four raw files

It runs in an environment of its own and prints one JSON line: seconds and accuracy.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from keras import layers, models, utils

folder = Path(sys.argv[1])
started = time.perf_counter()


def read(name: str, header: int) -> np.ndarray:
    return np.frombuffer((folder / name).read_bytes(), np.uint8, offset=header)


train_images = read("train-images-idx3-ubyte", 16).reshape(-1, 28, 28, 1).astype("float32") / 255
test_images = read("t10k-images-idx3-ubyte", 16).reshape(-1, 28, 28, 1).astype("float32") / 255
train_labels = utils.to_categorical(read("train-labels-idx1-ubyte", 8), 10)
test_labels = utils.to_categorical(read("t10k-labels-idx1-ubyte", 8), 10)

model = models.Sequential(
    [
        layers.Input((28, 28, 1)),
        layers.Conv2D(32, (3, 3), activation="relu"),
        layers.MaxPooling2D((2, 2)),
        layers.Flatten(),
        layers.Dense(10, activation="softmax"),
    ]
)
model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
model.fit(train_images, train_labels, epochs=3, batch_size=32, verbose=0)
trained = time.perf_counter()
loss, accuracy = model.evaluate(test_images, test_labels, verbose=0)
ended = time.perf_counter()
print(json.dumps({"fit": trained - started, "all": ended - started, "accuracy": float(accuracy)}))
