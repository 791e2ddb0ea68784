"""The stock Flower app's ClientApp. Flower starts a process for each message, which imports and loads all of this."""

from __future__ import annotations

import task
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    model, loader, _ = load(msg, context)
    config = context.run_config
    loss = task.train(model, loader, int(config["local-steps"]), float(config["learning-rate"]))
    examples = int(config["local-steps"]) * int(config["batch-size"])
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    metrics = MetricRecord({"train_loss": loss, "num-examples": examples})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    model, _, loader = load(msg, context)
    metrics = MetricRecord({"eval_loss": task.evaluate(model, loader), "num-examples": len(loader.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)


def load(msg: Message, context: Context) -> tuple[PeftModel, DataLoader, DataLoader]:
    config = context.run_config
    model = task.load_model(str(config["model"]))
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    return model, *task.load_data(str(config["data"]), int(context.node_config["partition-id"]), int(config["batch-size"]))
