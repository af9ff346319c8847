"""Twenty prompts whose greedy answers are long and varied; fixed, so that runs can be compared."""

PROMPTS = (
    "Explain how a bicycle stays upright while it is moving.",
    "Why do people put salt on icy roads, and what does it do to the ice?",
    "What happens to bread dough that is left in a warm kitchen overnight?",
    "Tell the story of a lighthouse keeper who finds a message in a bottle.",
    "What is the difference between weather and climate?",
    "Give step by step instructions for making vegetable soup.",
    "Describe the taste of a lemon to someone who has never eaten one.",
    "Why do cats purr? Answer in a few sentences.",
    "Write a Python function that returns the longest word in a sentence, and explain it.",
    "Summarise the plot of Romeo and Juliet in your own words.",
    "What should I ask when I visit a flat that I might rent?",
    "Compare travelling by train and by plane inside Europe.",
    "Invent three names for a small bakery and explain each.",
    "How does a vaccine protect the body against a disease?",
    "Write a poem about rain on a tin roof.",
    "What are the main duties of a village mayor?",
    "My plants have yellow leaves. What may be wrong, and what can I do?",
    "Plan a quiet birthday afternoon for my grandmother, who likes music and gardens.",
    "Explain photosynthesis to a ten year old child.",
    "Translate into simple English: the committee deferred its deliberations pending further evidence.",
)
