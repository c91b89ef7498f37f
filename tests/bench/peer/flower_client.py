"""The stock Flower app's client side, as its tutorial writes it."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from network import PlainCNN, work

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round at a site."""
    network = PlainCNN(int(context.run_config["width"]))
    network.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    loss = work(network, int(context.node_config["partition-id"]))
    metrics = MetricRecord({"num-examples": 8, "loss": loss})
    return Message(RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics}), reply_to=message)
