"""The base: loading, packed attention, the loss head, and slots: many customizations on one base."""
