#include "policy/grammar/formats.h"

#include <map>

namespace perigee::policy {
namespace {

const std::map<std::string, std::string, std::less<>>& formats() {
  // February has 28 days, and no minute has a second 60: what is written is valid in every year.
  static const std::string date =
      R"(\d{4}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8])))";
  static const std::string time =
      R"(([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d))";
  static const std::string octet = R"((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d))";
  static const std::string label = R"([A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?)";
  static const std::string host = label + R"((\.)" + label + "){0,6}";
  static const std::string hours = R"((T(\d{1,4}H(\d{1,4}M(\d{1,4}S)?)?|\d{1,4}M(\d{1,4}S)?|\d{1,4}S)))";
  static const std::string days = R"((\d{1,4}Y(\d{1,4}M(\d{1,4}D)?)?|\d{1,4}M(\d{1,4}D)?|\d{1,4}D))";
  static const std::map<std::string, std::string, std::less<>> all = {
      {"date", "^" + date + "$"},
      {"time", "^" + time + "$"},
      {"date-time", "^" + date + "T" + time + "$"},
      {"duration", "^P(" + days + hours + "?|" + hours + R"(|\d{1,4}W)$)"},
      {"email", R"(^[A-Za-z0-9_+-]{1,20}(\.[A-Za-z0-9_+-]{1,20}){0,2}@)" + host + "$"},
      {"hostname", "^" + host + "$"},
      {"ipv4", "^" + octet + R"((\.)" + octet + "){3}$"},
      {"ipv6", "^[0-9a-fA-F]{1,4}(:[0-9a-fA-F]{1,4}){7}$"},
      {"uuid", "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"},
  };
  return all;
}

}  // namespace

std::string format_pattern(std::string_view name) {
  const auto it = formats().find(name);
  return it == formats().end() ? "" : it->second;
}

std::vector<std::string> format_names() {
  std::vector<std::string> out;
  for (const auto& [name, unused] : formats()) out.push_back(name);
  return out;
}

}  // namespace perigee::policy
