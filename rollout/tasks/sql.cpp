// Questions over a generated table: an environment with the sql tool answers them.
#include <algorithm>
#include <array>

#include "base/error.h"
#include "rollout/tasks/detail.h"

namespace perigee::rollout {
namespace {

constexpr std::array<std::string_view, 12> kCustomers = {"Ada", "Bela", "Cleo", "Dora", "Egon", "Fritz",
                                                         "Gus", "Hana", "Ivo",  "Jana", "Kurt", "Lena"};
constexpr std::array<std::string_view, 8> kProducts = {"lamp",  "chair",  "table", "shelf",
                                                       "clock", "mirror", "stool", "carpet"};
constexpr std::string_view kDatabase = "data.sqlite";

struct Order {
  std::string_view customer, product;
  int64_t quantity, price;
};

template <size_t n>
std::string_view pick(const std::array<std::string_view, n>& names, Random& random) {
  return names[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(n) - 1))];
}

class Sql : public Generator {
 public:
  explicit Sql(JsonReader& options) {
    max_rows_ = options.integer("max_rows", 1, 100000, 60);
    min_rows_ = options.integer("min_rows", 1, max_rows_, std::min<int64_t>(20, max_rows_));
  }

  Problem draw(Random& random) const override {
    std::vector<Order> orders(static_cast<size_t>(random.next_int(min_rows_, max_rows_)));
    for (Order& o : orders)
      o = {pick(kCustomers, random), pick(kProducts, random), random.next_int(1, 20),
           random.next_int(3, 400)};
    const Order& asked =
        orders[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(orders.size()) - 1))];

    std::string question, query;
    int64_t answer = 0;
    const auto of_customer = [&](const Order& o) { return o.customer == asked.customer; };
    const auto of_product = [&](const Order& o) { return o.product == asked.product; };
    switch (random.next_int(0, 4)) {
      case 0:
        question = fmt::format("How many orders did {} place?", asked.customer);
        query = fmt::format("SELECT count(*) FROM orders WHERE customer = '{}'", asked.customer);
        answer = std::count_if(orders.begin(), orders.end(), of_customer);
        break;
      case 1:
        question = fmt::format("How many pieces of the product {} were ordered in all?", asked.product);
        query = fmt::format("SELECT sum(quantity) FROM orders WHERE product = '{}'", asked.product);
        for (const Order& o : orders) answer += of_product(o) ? o.quantity : 0;
        break;
      case 2:
        question =
            fmt::format("How much did {} pay in all? An order costs quantity times price.", asked.customer);
        query = fmt::format("SELECT sum(quantity * price) FROM orders WHERE customer = '{}'", asked.customer);
        for (const Order& o : orders) answer += of_customer(o) ? o.quantity * o.price : 0;
        break;
      case 3:
        question = fmt::format("What is the largest quantity of the product {} in one order?", asked.product);
        query = fmt::format("SELECT max(quantity) FROM orders WHERE product = '{}'", asked.product);
        for (const Order& o : orders) answer = std::max(answer, of_product(o) ? o.quantity : 0);
        break;
      default: {
        const int64_t limit = random.next_int(50, 300);
        question = fmt::format("How many different customers placed an order with a price above {}?", limit);
        query = fmt::format("SELECT count(DISTINCT customer) FROM orders WHERE price > {}", limit);
        std::vector<std::string_view> names;
        for (const Order& o : orders)
          if (o.price > limit) names.push_back(o.customer);
        std::sort(names.begin(), names.end());
        answer = std::unique(names.begin(), names.end()) - names.begin();
      }
    }

    Problem problem;
    Task& task = problem.task;
    task.prompt = fmt::format(
        "{}\nThe database has the table orders(id, customer, product, quantity, price). "
        "Answer with the number alone.",
        question);
    task.answer = std::to_string(answer);
    task.verifier = "numeric";
    std::string sql =
        "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT, product TEXT, quantity INTEGER, price "
        "INTEGER);";
    std::string rows;
    for (const Order& o : orders)
      rows += fmt::format("{}(NULL,'{}','{}',{},{})", rows.empty() ? "" : ",", o.customer, o.product,
                          o.quantity, o.price);
    sql += "INSERT INTO orders VALUES " + rows;
    problem.canonical = "sql " + question + " " + rows;
    task.files.push_back({std::string(kDatabase), std::move(sql), true});
    const nlohmann::json arguments = {{"query", query}};
    task.worked_turns = {{policy::Role::kAssistant, "", {{"", "sql", arguments.dump()}}},
                         {policy::Role::kAssistant, task.answer}};
    return problem;
  }

 private:
  int64_t min_rows_, max_rows_;
};

}  // namespace

std::unique_ptr<Generator> make_sql_tasks(JsonReader& options, const WorkedStyle&) {
  return std::make_unique<Sql>(options);
}

}  // namespace perigee::rollout
