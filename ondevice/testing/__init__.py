"""What a backend, a family or a program above them is tested with; shipped, so that a third party's tests are short.

`conformance`  every operation of a backend beside the reference, in one process (`docs/adding-a-backend.md`)
`strict`       a backend whose arrays allow model code nothing but what the contract allows
`family`       a family's tiny random twin beside transformers
`scripted`     a decoder that says what it is told to, for tests of everything above the model
"""
