"""The plain loop: one process, one model, one client after the other. What the work itself costs with PEFT and transformers."""

import work


def main() -> None:
    args = work.arguments(__doc__).parse_args()
    model = work.kept_model()
    adapter = work.read_adapter(model)
    clock = work.Clock()
    for _ in range(args.rounds + 1):
        total = {name: tensor * 0 for name, tensor in adapter.items()}
        for client_id in range(args.clients):
            update, _ = work.local_training(model, adapter, client_id)
            for name, tensor in update.items():
                total[name] += tensor / args.clients
        adapter = total
        clock.mark()
    clock.report("plain loop, 1 process", args.clients)


if __name__ == "__main__":
    main()
